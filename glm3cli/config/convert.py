"""The options of the `glm3 convert` commands, and `ConvertOptions`, which the core takes."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.parallel import ModelParallelConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class ConvertOptions:
    """The options of one conversion, in the same form for all convert commands.

    Attributes:
        layout: The layout of the new folder: how its files name and cut the weights.
        parallel: The parallel sizes for which per-rank files are cut.
        dtype: The type of the new weights; `keep` for the source's own.
        shard_bytes: Most bytes of tensors in one file of a Hugging Face folder.
        verify: Whether to read the new folder back and compare it with the source.
        force: Whether to replace an existing target folder.
        lora: The folder of a PEFT adapter to merge into the weights, or None.
    """

    layout: Literal["chatglm", "glm", "legacy", "mcore", "dist"]
    parallel: ModelParallelConfig = field(default_factory=ModelParallelConfig)
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    shard_bytes: int = 5 * 10**9
    verify: bool = True
    force: bool = False
    lora: Path | None = None


class ConvertConfig(Settings):
    """The options that `hf2mg`, `mg2hf` and `mg2mg` share."""

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
        description="LoRA adapter to merge into the weights (in fp32): a folder in PEFT's layout, "
        "or a run or checkpoint that trained it.",
    )
    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="Print the result as one JSON object."
    )


class ToMegatronConfig(ConvertConfig, ModelParallelConfig):
    """The options of `glm3 convert hf2mg` and `glm3 convert mg2mg`."""

    format: Literal["mcore", "legacy", "dist"] = Field(
        default="mcore",
        description="Per-rank files with megatron-core or legacy names, or one layout-free "
        "checkpoint (which ignores tp and pp).",
    )

    @property
    def options(self) -> ConvertOptions:
        """The options in the form that the core (`checkpoint.convert`) takes."""
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
    """The options of `glm3 convert mg2hf`."""

    layout: Literal["chatglm", "glm"] = Field(
        default="chatglm",
        description="Names and files of the original remote code, or of transformers' own "
        "GlmForCausalLM, which needs none.",
    )
    shard_size: Annotated[str, Flag(metavar="SIZE")] = Field(
        default="5GB",
        description="Largest file of weights, such as 500MB or 5GB (powers of 1000).",
        pattern=r"^(?i:\d{1,15}(\.\d{1,15})?[KMGT]?B?)$",
    )

    @property
    def options(self) -> ConvertOptions:
        """The options in the form that the core (`checkpoint.convert`) takes."""
        return ConvertOptions(
            layout=self.layout,
            dtype=self.dtype,
            shard_bytes=_num_bytes(self.shard_size),
            verify=self.verify,
            force=self.force,
            lora=self.lora,
        )


class AdapterOptions(Settings):
    """The options of `glm3 convert adapter`."""

    source: Annotated[Path, Flag(positional=True, metavar="SRC")] = Field(
        description="Folder of a PEFT LoRA adapter, or a run or checkpoint that trained one."
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
    """The options of `glm3 convert inspect`."""

    path: Annotated[Path, Flag(positional=True, metavar="PATH")] = Field(
        description="A model in any layout."
    )
    check: bool = Field(
        default=False,
        description="Read everything and compare it with the folder's glm3-manifest.json.",
    )
    server: Annotated[
        Literal["vllm", "mindie", "llama.cpp", "transformers"] | None, Flag(name="for")
    ] = Field(
        default=None,
        description="Say what keeps this program from loading the folder as it is, by its rules.",
    )
    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="Print one JSON object."
    )


class ScriptConfig(Settings):
    """The options of `glm3 convert script`."""

    script: Annotated[Path, Flag(positional=True, metavar="SCRIPT")] = Field(
        description="A bash script of ModelLink or MindSpeed-LLM; it is read, never executed."
    )
    arguments: Annotated[list[str], Flag(positional=True, metavar="ARGUMENT")] = Field(
        default=[], description="What the script would be called with, its $1 and so on."
    )
    variables: Annotated[list[str], Flag(name="set", metavar="NAME=VALUE")] = Field(
        default=[], description="Value of a variable, in place of the script's; repeat for several."
    )
    number: int | None = Field(
        default=None, ge=1, description="Of several programs that it starts, translate this one."
    )
    output: Annotated[Path | None, Flag(metavar="FILE", is_written=True)] = Field(
        default=None, description="Write the result here, not to stdout."
    )
    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="Print one JSON object."
    )

    @field_validator("variables")
    @classmethod
    def _check_variables(cls, items: list[str]) -> list[str]:
        for item in items:
            if not re.match(r"[A-Za-z_]\w*=", item):
                raise ValueError(f"{item} is no NAME=VALUE")
        return items

    @property
    def values(self) -> dict[str, str]:
        """The values of `--set`, by the names of the variables."""
        return {name: value for name, _, value in (item.partition("=") for item in self.variables)}


def _num_bytes(size: str) -> int:
    """Converts a size such as 500MB or 5g to bytes; units are powers of 1000."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", size.upper()).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit if unit in _UNITS else unit + "B"])
