"""The checks of a conversion that need no torch, so that a mistake is reported within a second."""

from pathlib import Path

from glm3cli.checkpoint.adapter.config import read_adapter_config
from glm3cli.checkpoint.convert.target import check_target
from glm3cli.checkpoint.locate import locate
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import ConfigError


def check_request(source: Path, target: Path, options: ConvertOptions) -> None:
    """Checks paths, config.json and divisibility.

    Raises:
        CheckpointError: The source isn't there, holds no model, or its config.json is wrong; or
            the adapter's.
        ConfigError: The target may not be written, or the model can't be cut as asked.
        DataError: The tokenizer can't be written in the new layout.
    """
    location = locate(source)
    check_target(target, source, force=options.force)
    if options.layout == "glm":
        _check_tokenizer(source)
    if options.lora is not None:
        read_adapter_config(options.lora)
    if location.config is None and location.kind == "ranks":
        return  # the shape stands in the files themselves
    model = ModelConfig.from_file(location.config or location.folder)
    if options.layout in ("mcore", "legacy"):
        options.parallel.check_fits(model)
    if options.layout == "legacy":
        check_legacy(options.parallel, model)


def _check_tokenizer(source: Path) -> None:
    from glm3cli.checkpoint.layouts.companions import find_companion
    from glm3cli.data.tokens.fast_tokenizer import check_fast
    from glm3cli.data.tokens.tokenizer import FILE_NAME, Tokenizer

    file = find_companion(source, FILE_NAME)
    if file is not None:
        check_fast(Tokenizer.load(file))


def check_legacy(parallel: ModelParallelConfig, model: ModelConfig) -> None:
    """Checks that Megatron's legacy model can be cut as asked.

    Raises:
        ConfigError: There are more tensor-parallel ranks than query groups.
    """
    if model.num_query_groups % parallel.tp:
        raise ConfigError(
            f"multi_query_group_num {model.num_query_groups} is not divisible by --tp "
            f"{parallel.tp}, which --format legacy needs",
            f"use --format mcore, or a --tp that divides {model.num_query_groups}",
        )
