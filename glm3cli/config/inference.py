"""The options of `glm3 generate`, and those that it shares with `glm3 eval`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.launch import LaunchConfig
from glm3cli.config.parallel import ParallelConfig

# The lowest temperature: logits divided by it are numbers in fp32, and one token has all the mass.
COLDEST = 1e-4
MODEL, SAMPLING, OUTPUT = "Model", "Sampling", "Output"


class InferenceConfig(ParallelConfig, LaunchConfig):
    """The options of every command that runs inference: which model runs, and where."""

    model: Annotated[Path, Flag(panel=MODEL)] = Field(
        description="Model folder in any layout, or a training run's folder."
    )
    lora: Annotated[Path | None, Flag(panel=MODEL, metavar="ADAPTER")] = Field(
        default=None,
        description="LoRA adapter to compute with: a folder in PEFT's layout, or a run or "
        "checkpoint that trained it.",
    )
    tokenizer: Annotated[Path | None, Flag(panel=MODEL)] = Field(
        default=None, description="Folder or tokenizer.model; default: the one in --model."
    )
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, Flag(panel=MODEL)] = Field(
        default=None, description="Type to run in; default: the model's, but fp32 on a CPU."
    )

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        given = {"--vpp": self.vpp > 1, "--cp": self.cp > 1, "--mc2": self.mc2}
        for flag, is_given in given.items():
            if is_given:
                raise ValueError(f"{flag} is for training; it makes no sense here")
        return self


class SamplingOptions(Settings):
    """The options for the length of an answer and for how each token is drawn."""

    max_new_tokens: Annotated[int, Flag(panel=SAMPLING)] = Field(
        default=128, ge=1, le=2**20, description="Longest answer, in tokens."
    )
    greedy: Annotated[bool, Flag(panel=SAMPLING)] = Field(
        default=False, description="Always take the likeliest token."
    )
    temperature: Annotated[float, Flag(panel=SAMPLING)] = Field(
        default=0.7, ge=COLDEST, description="Below 1 sharpens, above 1 flattens the distribution."
    )
    top_k: Annotated[int, Flag(panel=SAMPLING)] = Field(
        default=50, ge=0, description="Draw among the K likeliest tokens; 0: among all."
    )
    top_p: Annotated[float, Flag(panel=SAMPLING)] = Field(
        default=0.95, gt=0, le=1, description="Draw among the likeliest tokens of this mass."
    )
    seed: Annotated[int, Flag(panel=SAMPLING)] = Field(
        default=42, ge=0, lt=2**63, description="Same seed, same text."
    )


class GenerateConfig(SamplingOptions, InferenceConfig):
    """The options of `glm3 generate`."""

    prompt: list[str] = Field(default=[], description="Text to continue; repeat for several.")
    prompts_file: Path | None = Field(
        default=None, description="JSON Lines with a prompt, a string, or messages per line."
    )
    output: Annotated[Path | None, Flag(panel=OUTPUT)] = Field(
        default=None, description="JSON Lines for the results of --prompts-file, as they come."
    )
    resume: Annotated[bool, Flag(panel=OUTPUT)] = Field(
        default=False, description="Go on where --output ends."
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop",
        description="What a bad line of --prompts-file does: end the run, or have no answer.",
    )
    chat: bool = Field(default=False, description="Talk with the model, turn by turn.")
    system: str | None = Field(default=None, description="System prompt of --chat.")
    tools: Path | None = Field(
        default=None, description="JSON file of tools for --chat, or Python file of functions."
    )
    run_tools: bool = Field(
        default=False, description="Run the functions of --tools that the model calls in --chat."
    )
    raw: Annotated[bool, Flag((" /--answer",))] = Field(
        default=True,
        description="Continue the text; --answer (or --no-raw) asks it as a user's turn.",
    )
    stream: Annotated[bool, Flag(panel=OUTPUT)] = Field(
        default=False, description="Print the text as it comes (one prompt)."
    )
    logprobs: Annotated[bool, Flag(panel=OUTPUT)] = Field(
        default=False, description="With --json: the log-probability of every new token."
    )
    as_json: Annotated[bool, Flag(name="json", panel=OUTPUT)] = Field(
        default=False, description="The result as one JSON object."
    )

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        given = [bool(self.prompt), self.prompts_file is not None, self.chat]
        if sum(given) != 1:
            raise ValueError("give one of --prompt TEXT, --prompts-file FILE, --chat")
        if "" in self.prompt:
            raise ValueError("--prompt is empty; give it a text")
        if self.output is not None and self.prompts_file is None:
            raise ValueError("--output goes with --prompts-file")
        if self.resume and self.output is None:
            raise ValueError("--resume goes with --output, whose results it goes on with")
        if self.chat and self.as_json:
            raise ValueError("--chat talks; it has no --json result")
        if self.stream and (len(self.prompt) != 1 or self.as_json):
            raise ValueError("--stream goes with one --prompt, without --json")
        if not self.chat and (self.system or self.tools):
            raise ValueError("--system and --tools go with --chat")
        if self.run_tools and (self.tools is None or self.tools.suffix != ".py"):
            raise ValueError(
                "--run-tools goes with --chat and --tools FILE.py, whose functions it runs"
            )
        return self
