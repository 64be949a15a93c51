"""The options of the convert commands."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from glm3cli.config.base import Flag, Settings
from glm3cli.config.parallel import ModelParallelConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class ConvertOptions:
    """What every conversion is told, whichever command it comes from.

    Attributes:
        layout: Naming and order of the weights in the new folder.
        parallel: How per-rank files are cut.
        dtype: Type of the new weights; `keep` is the source's.
        shard_bytes: Most bytes of tensors in one file of a Hugging Face folder.
        verify: Whether to read the new folder back and compare it.
        force: Whether an existing target is replaced.
        lora: Folder of a PEFT adapter to merge.
    """

    layout: Literal["chatglm", "glm", "legacy", "mcore", "dist"]
    parallel: ModelParallelConfig = field(default_factory=ModelParallelConfig)
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    shard_bytes: int = 5 * 10**9
    verify: bool = True
    force: bool = False
    lora: Path | None = None


class ConvertConfig(Settings):
    """Options that all conversions share."""

    source: Annotated[Path, Flag(positional=True, metavar="SRC")] = Field(
        description="The model to convert, in any layout."
    )
    target: Annotated[Path, Flag(positional=True, metavar="DST")] = Field(
        description="The new folder."
    )
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = Field(
        default="keep", description="Type of the new weights."
    )
    verify: bool = Field(
        default=True, description="Read the new folder back and compare every tensor."
    )
    force: bool = Field(default=False, description="Replace DST if it exists.")
    lora: Annotated[Path | None, Flag(metavar="ADAPTER")] = Field(
        default=None,
        description="Folder of a PEFT LoRA adapter to merge into the weights (in fp32).",
    )
    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="Print the result as one JSON object."
    )


class ToMegatronConfig(ConvertConfig, ModelParallelConfig):
    """Options of hf2mg and mg2mg."""

    format: Literal["mcore", "legacy", "dist"] = Field(
        default="mcore",
        description="Per-rank files with megatron-core or legacy names, or one layout-free "
        "checkpoint (which ignores tp and pp).",
    )

    @property
    def options(self) -> ConvertOptions:
        """These options in the form that the core takes."""
        cuts = {name: getattr(self, name) for name in ModelParallelConfig.model_fields}
        parallel = (
            ModelParallelConfig() if self.format == "dist" else ModelParallelConfig.parse(cuts)
        )
        return ConvertOptions(
            layout=self.format,
            parallel=parallel,
            dtype=self.dtype,
            verify=self.verify,
            force=self.force,
            lora=self.lora,
        )


class ToHfConfig(ConvertConfig):
    """Options of mg2hf."""

    layout: Literal["chatglm", "glm"] = Field(
        default="chatglm",
        description="Names and files of the original remote code, or of transformers' own "
        "GlmForCausalLM, which needs none.",
    )
    shard_size: Annotated[str, Flag(metavar="SIZE")] = Field(
        default="5GB",
        description="Largest file of weights, such as 500MB or 5GB (powers of 1000).",
        pattern=r"^(?i:\d+(\.\d+)?[KMGT]?B?)$",
    )

    @property
    def options(self) -> ConvertOptions:
        """These options in the form that the core takes."""
        return ConvertOptions(
            layout=self.layout,
            dtype=self.dtype,
            shard_bytes=_num_bytes(self.shard_size),
            verify=self.verify,
            force=self.force,
            lora=self.lora,
        )


class AdapterOptions(Settings):
    """Options of adapter."""

    source: Annotated[Path, Flag(positional=True, metavar="SRC")] = Field(
        description="Folder of a PEFT LoRA adapter."
    )
    target: Annotated[Path, Flag(positional=True, metavar="DST")] = Field(
        description="The new folder."
    )
    model: Annotated[Path, Flag(metavar="MODEL")] = Field(
        description="The model that the adapter was trained on, in any layout."
    )
    layout: Literal["chatglm", "glm"] = Field(
        description="Whose names the adapter gets: those of the original remote code, or of "
        "transformers' own GlmForCausalLM."
    )
    force: bool = Field(default=False, description="Replace DST if it exists.")
    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="Print the result as one JSON object."
    )


class InspectConfig(Settings):
    """Options of inspect."""

    path: Annotated[Path, Flag(positional=True, metavar="PATH")] = Field(
        description="A model in any layout."
    )
    check: bool = Field(
        default=False,
        description="Read everything and compare it with the folder's glm3-manifest.json.",
    )
    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="Print one JSON object."
    )


def _num_bytes(size: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", size.upper()).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit if unit in _UNITS else unit + "B"])
