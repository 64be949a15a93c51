"""The checkpoints in the folder of a run, by their names alone; needs no torch."""

from pathlib import Path

from glm3cli.checkpoint.locate import iteration_of
from glm3cli.errors import CheckpointError, ConfigError

BEST = "best"  # the link in a run's folder to the checkpoint with the lowest validation loss


def find_checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoints in the folder of a run, oldest first.

    A folder that has the name of a checkpoint is complete; others, such as one that is being
    written, have other names.
    """
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if iteration_of(path) is not None and path.is_dir()]
    return sorted(found, key=iteration_key)


def iteration_key(checkpoint: Path) -> int:
    """Returns the iteration in the name of a checkpoint, by which they are in order."""
    return iteration_of(checkpoint) or 0


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


def set_aside(run: Path, newest: Path) -> list[Path]:
    """Renames the checkpoints of a run that are later than its newest one; returns the new paths.

    RUN/best isn't to lead to one of them.
    """
    aside = []
    for checkpoint in find_checkpoints(run):
        if iteration_key(checkpoint) <= iteration_key(newest):
            continue
        name, number = f"aside_{checkpoint.name}", 1
        while (run / name).exists():
            number += 1
            name = f"aside_{checkpoint.name}-{number}"
        checkpoint.rename(run / name)
        aside.append(run / name)
    if aside and not (run / BEST).exists():
        (run / BEST).unlink(missing_ok=True)
    return aside


def link_best(run: Path, name: str) -> None:
    """Makes RUN/best a link to the checkpoint of this name, or moves it there in one go."""
    link = run / BEST
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)
