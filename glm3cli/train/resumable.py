"""Finds the checkpoints that a run may go on from by their names alone; needs no torch."""

from pathlib import Path

from glm3cli.checkpoint.locate import iteration_of
from glm3cli.errors import CheckpointError, ConfigError


def find_checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoints in the folder of a run, oldest first.

    A folder that has the name of a checkpoint is complete; others, such as one that is being
    written, have other names.
    """
    if not run.is_dir():
        return []
    return sorted(
        path for path in run.iterdir() if iteration_of(path) is not None and path.is_dir()
    )


def find_resume(run: Path, resume: str) -> list[Path]:
    """Returns the checkpoints that a run may go on from, the first choice first.

    Args:
        run: The folder of the run.
        resume: The value of `--resume`: `auto`, `never`, or a folder.

    Returns:
        The candidates, all in one folder; none for a run that starts anew.

    Raises:
        ConfigError: `resume` is `never`, but the run has checkpoints, with which those of a new run
            would be mixed up.
        CheckpointError: `resume` names a folder that neither is a checkpoint nor has one in it.
    """
    checkpoints = find_checkpoints(run)
    if resume == "auto":
        return checkpoints[::-1]
    if resume == "never":
        if checkpoints:
            raise ConfigError(
                f"--save {run} already holds {checkpoints[-1].name}",
                "use --resume auto to go on, or another --save",
            )
        return []
    path = Path(resume)
    if path.is_symlink():  # such as RUN/best
        path = path.resolve()
    if iteration_of(path) is not None and path.is_dir():
        return [path]
    candidates = find_checkpoints(path)
    if not candidates:
        raise CheckpointError(
            f"--resume {resume} is no checkpoint and has none in it",
            "give auto, never, or a folder such as RUN/iter_0000030",
        )
    return candidates[::-1]
