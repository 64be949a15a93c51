"""`train`: the whole of a pretrain or finetune command, which cli/train.py calls."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from glm3cli.checkpoint.locate import iteration_folder
from glm3cli.config.training import TrainConfig
from glm3cli.data.kinds import DataKind
from glm3cli.parallel.launch import is_speaker, run_here
from glm3cli.plan.fit import check_memory
from glm3cli.train.prepare import Prepared, prepare

if TYPE_CHECKING:
    from glm3cli.data.preprocess.run import PreprocessProgress
    from glm3cli.data.raw import RawData

# Opens the display of preprocess's progress, and gives what is called with it.
Display = Callable[[], AbstractContextManager[Callable[["PreprocessProgress"], None]]]
Say = Callable[[str], None]


def train(config: TrainConfig, kind: DataKind, display: Display, say: Say) -> Path | None:
    """Checks a training, preprocesses its raw data, and trains on the ranks that there are.

    Args:
        config: The settings.
        kind: The kind of data that the command reads.
        display: Shows the progress while raw data is preprocessed.
        say: Called with lines for the user, on one rank.

    Returns:
        The final checkpoint, on rank 0; None on other ranks, and in a process that has only
        started the ranks.

    Raises:
        Glm3Error: As its children say, each with the way out.
    """
    prepared = prepare(config, kind)
    check_memory(config, prepared.model)
    # By the one process that starts the ranks, where --nproc does; they find it done.
    prefixes = {item: _preprocess(data, display, say) for item, data in prepared.raw.items()}
    blend = prepared.blend(prefixes)
    if not run_here(config):
        return None
    if is_speaker():
        from glm3cli.data.samples.blend_table import table

        say(table(prepared.data_sources(blend)))
    from glm3cli.train.run import run_training

    state = run_training(prepared, blend)
    return config.save / iteration_folder(state.iteration) if is_speaker() else None


def dry_data(prepared: Prepared) -> str:
    """Describes the data of a training, as lines of text, and writes nothing.

    Raises:
        DataError: A file is missing, or the first row of a raw one is bad.
    """
    from glm3cli.data.samples.blend_table import table

    waiting = [data for data in prepared.raw.values() if data.look() is None]
    for data in waiting:
        data.check_first()
    if waiting:
        return "\n".join(
            f"data: {data.item} would be preprocessed into {data.prefix}" for data in waiting
        )
    blend = prepared.blend({item: data.prefix for item, data in prepared.raw.items()})
    return table(prepared.data_sources(blend))


def _preprocess(data: "RawData", display: Display, say: Say) -> str:
    """Returns the prefix of the files that preprocess makes, or has made, of raw data."""
    if not is_speaker():
        logging.getLogger("glm3cli.data").setLevel(logging.ERROR)
    with display() as report:
        done = data.prepare(report)
    if is_speaker():
        when = "was preprocessed before" if done.repeated else "is preprocessed"
        say(
            f"--data {data.item} {when}: {done.documents:,} documents, {done.tokens:,} tokens in "
            f"{data.prefix}"
        )
    return data.prefix
