"""Checks a conversion's request without torch, so that mistakes are reported within a second."""

from pathlib import Path

from glm3cli.checkpoint.adapter.config import read_adapter_config
from glm3cli.checkpoint.convert.target import check_target
from glm3cli.checkpoint.locate import locate, locate_adapter
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.family.recognise import known
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import ConfigError


def check_request(source: Path, target: Path, options: ConvertOptions) -> None:
    """Checks the paths, the config.json, and whether the model can be cut as asked.

    Args:
        source: The model to convert.
        target: The new folder.
        options: The options of the conversion.

    Raises:
        CheckpointError: The source doesn't exist, holds no model, or has a wrong config.json; or
            the adapter's config is missing or wrong.
        ConfigError: The target may not be written, or the model can't be cut as asked.
        DataError: The tokenizer can't be written in the new layout.
    """
    location = locate(source)
    check_target(target, source, force=options.force)
    if options.layout == "glm":
        _check_tokenizer(source)
    if options.lora is not None:
        read_adapter_config(locate_adapter(options.lora))
    if location.config is None and location.kind == "ranks":
        return  # the shape is in the rank files, which only torch can read
    model = ModelConfig.from_file(location.config or location.folder)
    if options.layout == "chatglm":
        _check_original(model, location.companions)
    if options.layout in ("mcore", "legacy"):
        options.parallel.check_fits(model)
    if options.layout == "legacy":
        check_legacy(options.parallel, model)


def _check_original(model: ModelConfig, folder: Path) -> None:
    """Checks that the original remote code, which the layout chatglm is for, computes a model.

    Args:
        model: The model's shape.
        folder: The folder of its config.json.

    Raises:
        ConfigError: The code can't compute it.
    """
    member = known(folder)
    has_own_code = member is not None and member.rope == "positions" and model.rope_ratio == 1
    if model.rope_factor != 1 and not has_own_code:
        raise ConfigError(
            f"the model divides its positions by {model.rope_factor} (linear RoPE scaling), which "
            "the original remote code of the layout chatglm can't",
            "use --layout glm",
        )
    if model.sandwich_norms:
        raise ConfigError(
            "the model has norms after attention and MLP, which the original remote code of the "
            "layout chatglm doesn't have",
            "use --layout glm",
        )


def _check_tokenizer(source: Path) -> None:
    """Checks that the model's tokenizer, if it has one, can be written as a tokenizer.json."""
    from glm3cli.checkpoint.layouts.companions import tokenizer_of
    from glm3cli.data.tokens.fast.tokenizer import check_fast

    tokenizer = tokenizer_of(source)
    if tokenizer is not None:
        check_fast(tokenizer)


def check_legacy(parallel: ModelParallelConfig, model: ModelConfig) -> None:
    """Checks that a model can be cut in the legacy layout.

    Args:
        parallel: The parallel sizes.
        model: The model's shape.

    Raises:
        ConfigError: The number of query groups isn't divisible by that of tensor-parallel ranks.
    """
    if model.num_query_groups % parallel.tp:
        raise ConfigError(
            f"multi_query_group_num {model.num_query_groups} is not divisible by --tp "
            f"{parallel.tp}, which --format legacy needs",
            f"use --format mcore, or a --tp that divides {model.num_query_groups}",
        )
