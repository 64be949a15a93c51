"""Writes a model in any layout: calls the writer of that layout.

The folder can be opened as a model once the writer asks for the first tensor: values that aren't
written yet are missing, and nothing else.
"""

from pathlib import Path

from glm3cli.checkpoint.layouts.hf_writer import write_hf
from glm3cli.checkpoint.layouts.ranks_writer import write_ranks
from glm3cli.checkpoint.layouts.write_plan import Final, Produce, WritePlan
from glm3cli.checkpoint.names import Layout


def write(layout: Layout, folder: Path, plan: WritePlan, produce: Produce, final: Final) -> None:
    """Writes all weights of a model; only one of them is in memory at a time.

    Args:
        layout: The layout to write.
        folder: A folder without weights.
        plan: The model, its parallel sizes, and the type of every tensor.
        produce: Returns the canonical tensor of a weight; called in the order of `slots`.
        final: Called with a file and the byte before which nothing is going to change.

    Raises:
        OSError, RuntimeError: The disk is full or failing.
    """
    if layout == "chatglm" or layout == "glm":
        write_hf(layout, folder, plan, produce, final)
    elif layout == "dist":
        # Takes half a second, which the other layouts save.
        from glm3cli.checkpoint.layouts.dist_writer import write_dist

        write_dist(folder, plan, produce, final)
    else:
        write_ranks(layout, folder, plan, produce, final)
