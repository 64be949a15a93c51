"""The writer of every layout."""

from pathlib import Path

from glm3cli.checkpoint.layouts.dist_writer import write_dist
from glm3cli.checkpoint.layouts.hf_writer import write_hf
from glm3cli.checkpoint.layouts.ranks_writer import write_ranks
from glm3cli.checkpoint.layouts.write_plan import Final, Produce, WritePlan
from glm3cli.checkpoint.names import Layout


def write(layout: Layout, folder: Path, plan: WritePlan, produce: Produce, final: Final) -> None:
    """Writes a whole model into the empty `folder`, asking `produce` for one tensor at a time.

    Args:
        layout: The names, and how the files are cut.
        folder: Where to.
        plan: The model, its parallel sizes, and the type of every tensor.
        produce: Gives the tensors; it is asked for all of them in the order of `slots`.
        final: Called with a file and the byte before which nothing is going to change.

    Raises:
        OSError, RuntimeError: The disk is full or failing.
    """
    if layout == "chatglm" or layout == "glm":
        write_hf(layout, folder, plan, produce, final)
    elif layout == "dist":
        write_dist(folder, plan, produce, final)
    else:
        write_ranks(layout, folder, plan, produce, final)
