"""Writes a model in any layout: opens the writer of that layout."""

from pathlib import Path

from glm3cli.checkpoint.layouts.hf_writer import HfWriter
from glm3cli.checkpoint.layouts.ranks_writer import RanksWriter
from glm3cli.checkpoint.layouts.write_plan import Final, WritePlan, Writer
from glm3cli.checkpoint.names import Layout


def open_writer(layout: Layout, folder: Path, plan: WritePlan, final: Final) -> Writer:
    """Makes the files of a model without the values of its weights, which the caller fills in.

    Args:
        layout: The layout to write.
        folder: A folder without weights.
        plan: The model, its parallel sizes, and the type of every tensor.
        final: Called with a file and the byte before which nothing is going to change.

    Raises:
        OSError, RuntimeError: The disk is full or failing.
    """
    if layout == "chatglm" or layout == "glm":
        return HfWriter(layout, folder, plan, final)
    if layout == "dist":
        # Takes half a second, which the other layouts save.
        from glm3cli.checkpoint.layouts.dist_writer import DistWriter

        return DistWriter(folder, plan, final)
    return RanksWriter(layout, folder, plan, final)
