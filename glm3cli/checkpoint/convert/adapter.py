"""Converts a LoRA adapter to the module names of the other Hugging Face layout."""

from pathlib import Path

from glm3cli.checkpoint.adapter.config import read_adapter_config
from glm3cli.checkpoint.adapter.reader import open_adapter
from glm3cli.checkpoint.adapter.writer import write_adapter
from glm3cli.checkpoint.convert.target import check_target
from glm3cli.checkpoint.files.staging import staged
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.locate import locate_adapter
from glm3cli.checkpoint.names import HfLayout


def convert_adapter(
    source: Path, target: Path, base: Path, layout: HfLayout, *, force: bool
) -> int:
    """Writes an adapter again, with the module names of `layout`; no weights are merged.

    Args:
        source: The folder of a PEFT LoRA adapter, with the module names of either layout, or a
            run or checkpoint that trained one.
        target: The new folder.
        base: The model that the adapter was trained on, in any layout.
        layout: The layout whose module names the new adapter gets.
        force: Whether an adapter at `target` may be replaced.

    Returns:
        The number of adapted modules in the new adapter.

    Raises:
        CheckpointError: The adapter or the model is damaged, or they don't fit each other.
        ConfigError: The target may not be written.
    """
    check_target(target, source, force=force, kind="adapter")
    model = open_source(base, check=False).model
    source = locate_adapter(source)
    adapter = open_adapter(source, model)
    with staged(target, force=force) as folder:
        count = write_adapter(folder, adapter, layout, model, read_adapter_config(source), base)
        open_adapter(folder, model)  # the new files are complete and fit the base model
    return count
