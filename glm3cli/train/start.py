"""`train`: all that a pretrain or finetune command does; cli/train.py calls it."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from glm3cli.config.training import TrainConfig
from glm3cli.data.kinds import DataKind
from glm3cli.parallel.interrupts import SAVES
from glm3cli.parallel.launch import is_speaker, run_here
from glm3cli.plan.fit import check_memory
from glm3cli.train.prepare import Prepared, prepare

if TYPE_CHECKING:
    from glm3cli.data.preprocess.writing.write import PreprocessProgress
    from glm3cli.data.raw import RawData
    from glm3cli.train.probe import MakeProbes

# Opens a display of preprocess's progress, and yields the function that updates it.
Display = Callable[[], AbstractContextManager[Callable[["PreprocessProgress"], None]]]
# Shows a line of text to the user.
Say = Callable[[str], None]


def train(
    config: TrainConfig,
    kind: DataKind,
    display: Display,
    say: Say,
    probes: "MakeProbes | None" = None,
) -> Path | None:
    """Checks a training, preprocesses its raw data, and trains.

    Trains on the ranks that torchrun has started, or starts `--nproc` ranks and waits for them.

    Args:
        config: The settings of the run.
        kind: The kind of data that the command reads.
        display: Shows the progress while raw data is preprocessed.
        say: Shows a line to the user; called on rank 0 alone, or where the ranks are started.
        probes: Makes what looks at the model with each validation; None for nothing.

    Returns:
        The final checkpoint, on rank 0; None on other ranks, and in a process that has only
        started the ranks.

    Raises:
        Glm3Error: Any of its subclasses; message and hint say what is wrong, and what to do.
    """
    if not is_speaker():
        logging.getLogger("glm3cli.data").setLevel(logging.ERROR)
    prepared = prepare(config, kind)
    config = prepared.config
    check_memory(config, prepared.model)
    # With --nproc the one process that starts the ranks does it; they find it done.
    prefixes = {item: _preprocess(data, display, say) for item, data in prepared.raw.items()}
    blend = prepared.blend(prefixes)
    prepared = prepared.with_steps(blend)
    if not run_here(config, answers=SAVES):
        return None
    if is_speaker():
        from glm3cli.data.samples.blend_table import table

        if prepared.choice:
            say(prepared.choice)
        say(table(prepared.data_sources(blend)))
        for line in prepared.first_look(blend):
            say(line)
    from glm3cli.train.run import run_training

    checkpoint, result = run_training(prepared, blend, probes)
    if not is_speaker():
        return None
    if config.export_hf is not None:
        _export(result, config.export_hf, say)
    return checkpoint


def _export(checkpoint: Path, target: Path, say: Say) -> None:
    """Writes a checkpoint as a folder that transformers opens without remote code.

    Raises:
        CheckpointError: The folder can't be written.
    """
    from glm3cli.checkpoint.convert.convert import convert
    from glm3cli.config.convert import ConvertOptions

    say(f"{checkpoint} is exported to {target}")
    convert(checkpoint, target, ConvertOptions(layout="glm", force=True))


def dry_data(prepared: Prepared) -> tuple[Prepared, str]:
    """Looks at the data of a training for a dry run; it writes nothing.

    Returns:
        The training, with its number of steps if the data is there to be counted; and the data as
        lines of text.

    Raises:
        DataError: A file is missing, or the first row of a raw file is bad.
    """
    from glm3cli.data.samples.blend_table import table

    waiting = [data for data in prepared.raw.values() if data.look() is None]
    for data in waiting:
        data.check_first()
    if waiting:
        return prepared, "\n".join(
            f"data: {data.item} would be preprocessed into {data.prefix}" for data in waiting
        )
    blend = prepared.blend({item: data.prefix for item, data in prepared.raw.items()})
    prepared = prepared.with_steps(blend)
    return prepared, table(prepared.data_sources(blend))


def _preprocess(data: "RawData", display: Display, say: Say) -> str:
    """Preprocesses raw data, unless that was done before, and reports it.

    Args:
        data: An item of --data that isn't preprocessed.
        display: Shows the progress.
        say: Shows a line to the user.

    Returns:
        The prefix of the preprocessed files.

    Raises:
        DataError: The raw data is bad.
        ConfigError: The files can't be written.
        StoppedError: The process received SIGTERM.
    """
    with display() as report:
        done = data.prepare(report)
    if is_speaker():
        when = "was preprocessed before" if done.repeated else "is preprocessed"
        more = f", {done.truncated:,} cut to --seq-length" if done.truncated else ""
        more += f", {done.skipped:,} left out without an answer in it" if done.skipped else ""
        say(
            f"--data {data.item} {when}: {done.documents:,} documents, {done.tokens:,} tokens in "
            f"{data.prefix}{more}"
        )
    return data.prefix
