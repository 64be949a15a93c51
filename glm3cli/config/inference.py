"""The options of `glm3 generate`, and those that it shares with `glm3 eval`."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.launch import LaunchConfig
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.config.serving import ServeOptions

# The lowest temperature: logits divided by it are numbers in fp32, and one token has all the mass.
COLDEST = 1e-4
MODEL, SAMPLING, OUTPUT = "Model", "Sampling", "Output"
# What holds where neither an option nor the model's generation_config.json says anything.
DEFAULTS = {
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": "no",
}
# An adapter with the name by which clients of a server choose it.
_NAMED = re.compile(r"[\w.-]+=.+", re.S)
_BIAS = re.compile(r"\d+:[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I)


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

    quantize: Annotated[Literal["int8", "int4"] | None, Flag(panel=MODEL)] = Field(
        default=None,
        description="Round weights to 8 or 4 bits when they are loaded: faster, less exact.",
    )

    @property
    def adapter(self) -> Path | None:
        """The adapter that all texts are computed with."""
        return self.lora

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters among which each text chooses, by their names."""
        return {}

    def with_stages(self, model: ModelConfig) -> Self:
        """Returns the settings with the pipeline stages that suit what the model is to do."""
        return self

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        given = {"--vpp": self.vpp > 1, "--cp": self.cp > 1, "--mc2": self.mc2}
        for flag, is_given in given.items():
            if is_given:
                raise ValueError(f"{flag} is for training; it makes no sense here")
        return self


class SamplingOptions(Settings):
    """The options for the length of an answer and for how each token is chosen.

    Those that are None unless given have the values of the model's generation_config.json, or of
    `DEFAULTS` (see `infer.defaults`).
    """

    max_new_tokens: Annotated[int, Flag(panel=SAMPLING)] = Field(
        default=128, ge=1, le=2**20, description="Longest answer, in tokens."
    )
    greedy: Annotated[bool, Flag(panel=SAMPLING)] = Field(
        default=False, description="Always take the likeliest token."
    )
    temperature: Annotated[float | None, Flag(panel=SAMPLING)] = Field(
        default=None,
        ge=0,
        description="Below 1 sharpens, above 1 flattens the distribution; 0: --greedy. [0.7]",
    )
    top_k: Annotated[int | None, Flag(panel=SAMPLING)] = Field(
        default=None, ge=0, description="Draw among the K likeliest tokens; 0: among all. [50]"
    )
    top_p: Annotated[float | None, Flag(panel=SAMPLING)] = Field(
        default=None,
        gt=0,
        le=1,
        description="Draw among the likeliest tokens of this mass. [0.95]",
    )
    min_p: Annotated[float | None, Flag(panel=SAMPLING)] = Field(
        default=None,
        ge=0,
        le=1,
        description="Leave out tokens less likely than the likeliest times this. [0]",
    )
    repetition_penalty: Annotated[float | None, Flag(panel=SAMPLING)] = Field(
        default=None,
        gt=0,
        description="Above 1 makes tokens less likely that were there before. [1]",
    )
    presence_penalty: Annotated[float, Flag(panel=SAMPLING)] = Field(
        default=0.0, description="Taken from the logits of new tokens that were there before."
    )
    frequency_penalty: Annotated[float, Flag(panel=SAMPLING)] = Field(
        default=0.0, description="The same, for each time a token was there."
    )
    no_repeat_ngram_size: Annotated[int | None, Flag(panel=SAMPLING)] = Field(
        default=None, ge=0, description="No run of so many tokens comes twice; 0: any may. [0]"
    )
    logit_bias: Annotated[list[str], Flag(panel=SAMPLING, metavar="ID:NUMBER")] = Field(
        default=[], description="Add a number to the logit of a token; repeat for several."
    )
    num_beams: Annotated[int | None, Flag(panel=SAMPLING)] = Field(
        default=None,
        ge=1,
        description="Beam search; with --temperature and the like, beam sampling. [1]",
    )
    length_penalty: Annotated[float | None, Flag(panel=SAMPLING)] = Field(
        default=None, description="Of beams: above 0 favours long answers, below 0 short ones. [1]"
    )
    early_stopping: Annotated[Literal["no", "yes", "never"] | None, Flag(panel=SAMPLING)] = Field(
        default=None,
        description="End beams with the first --num-beams answers (yes), when none that runs is "
        "better (no), or could become so (never). [no]",
    )
    num_return_sequences: Annotated[int, Flag(panel=SAMPLING)] = Field(
        default=1, ge=1, description="Answers to each prompt."
    )
    stop: Annotated[list[str], Flag(panel=SAMPLING, metavar="TEXT")] = Field(
        default=[], description="End an answer before this text; repeat for several."
    )
    stop_id: Annotated[list[int], Flag(panel=SAMPLING, metavar="ID")] = Field(
        default=[], description="End an answer at this token, too; repeat for several."
    )
    ignore_eos: Annotated[bool, Flag(panel=SAMPLING)] = Field(
        default=False, description="No token ends an answer."
    )
    prompt_lookup: Annotated[int, Flag(panel=SAMPLING)] = Field(
        default=0,
        ge=0,
        le=64,
        description="With --greedy: guess up to N tokens from the text so far; the answer is the "
        "same.",
    )
    seed: Annotated[int, Flag(panel=SAMPLING)] = Field(
        default=42, ge=0, lt=2**63, description="Same seed, same text."
    )

    @property
    def asks_to_draw(self) -> bool:
        """Whether an option is given that only drawing has a use for."""
        given = (self.temperature, self.top_k, self.top_p, self.min_p)
        return any(one is not None for one in given)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; if not, the likeliest are taken, as beams do unless asked."""
        if self.greedy or self.temperature == 0:
            return False
        return (self.num_beams or 1) == 1 or self.asks_to_draw

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """The token ids of `logit_bias`, each with its number."""
        pairs = [one.partition(":") for one in self.logit_bias]
        return tuple((int(token), float(number)) for token, _, number in pairs)

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.temperature is not None and 0 < self.temperature < COLDEST:
            raise ValueError(
                f"--temperature {self.temperature} is below {COLDEST}; 0 takes the likeliest token"
            )
        if "" in self.stop:
            raise ValueError("--stop is empty; give the text before which an answer ends")
        for one in self.logit_bias:
            if not _BIAS.fullmatch(one):
                raise ValueError(f"--logit-bias {one} is no ID:NUMBER, such as 285:-2.5")
        beams, count = self.num_beams or 1, self.num_return_sequences
        given = {
            "--length-penalty": self.length_penalty not in (None, DEFAULTS["length_penalty"]),
            "--early-stopping": self.early_stopping not in (None, DEFAULTS["early_stopping"]),
        }
        for flag, is_given in given.items():
            if is_given and beams == 1:
                raise ValueError(f"{flag} goes with --num-beams of 2 or more")
        if beams > 1 and count > beams:
            raise ValueError(
                f"--num-return-sequences {count} is more than the {beams} of --num-beams"
            )
        if count > 1 and beams == 1 and not self.draws:
            raise ValueError(
                f"--num-return-sequences {count}: without --num-beams or drawing, all are the same"
            )
        if self.prompt_lookup and (self.draws or beams > 1):
            raise ValueError("--prompt-lookup goes with --greedy, without --num-beams")
        return self


class GenerateConfig(ServeOptions, SamplingOptions, InferenceConfig):
    """The options of `glm3 generate`."""

    lora: Annotated[list[str], Flag(panel=MODEL, metavar="ADAPTER", is_path=True)] = Field(  # type: ignore[assignment]
        default=[],
        description="LoRA adapter to compute with: a folder in PEFT's layout, or a run or "
        "checkpoint that trained it. With --serve also NAME=ADAPTER, which requests for the model "
        "NAME use; repeat for several.",
    )
    prompt: list[str] = Field(default=[], description="Text to continue; repeat for several.")
    prompts_file: Path | None = Field(
        default=None, description="JSON Lines with a prompt, a string, or messages per line."
    )
    output: Annotated[Path | None, Flag(panel=OUTPUT, is_written=True)] = Field(
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
    top_logprobs: Annotated[int, Flag(panel=OUTPUT)] = Field(
        default=0, ge=0, le=100, description="With --json: those of the N likeliest tokens, too."
    )
    max_batch_size: Annotated[int, Flag(panel=MODEL)] = Field(
        default=32,
        ge=1,
        description="The most answers that a pass of the model continues; with --pp as many passes "
        "are under way.",
    )
    json_schema: Annotated[Path | None, Flag(panel=SAMPLING)] = Field(
        default=None, description="File with a JSON schema that an answer follows."
    )
    regex: Annotated[str | None, Flag(panel=SAMPLING)] = Field(
        default=None, description="Regular expression that an answer matches."
    )
    truncate: bool = Field(
        default=False, description="Leave out the beginning of a prompt that is too long."
    )
    as_json: Annotated[bool, Flag(name="json", panel=OUTPUT)] = Field(
        default=False, description="The result as one JSON object."
    )

    @property
    def adapter(self) -> Path | None:
        """The adapter that all texts are computed with."""
        return next((Path(one) for one in self.lora if not self._is_named(one)), None)

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters among which each request chooses, by their names."""
        named = [one.split("=", 1) for one in self.lora if self._is_named(one)]
        return {name: Path(place) for name, place in named}

    def with_stages(self, model: ModelConfig) -> Self:
        """Returns the settings with stages that take about equally long to decode a token."""
        return self.balanced(model)

    def _is_named(self, lora: str) -> bool:
        """Returns whether a value of --lora is NAME=ADAPTER, which without --serve is a path."""
        return self.serve is not None and _NAMED.fullmatch(lora) is not None

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        named = [one.split("=", 1)[0] for one in self.lora if self._is_named(one)]
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"--lora {twice}=... is given twice; give each adapter its own name")
        if len(self.lora) - len(named) > 1:
            raise ValueError("--lora goes once, but with --serve, where NAME=ADAPTER repeats")
        if named and len(named) < len(self.lora):
            raise ValueError("--lora NAME=ADAPTER doesn't go with an adapter without a name")
        return self

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        given = [bool(self.prompt), self.prompts_file is not None, self.chat, bool(self.serve)]
        if sum(given) != 1:
            raise ValueError(
                "give one of --prompt TEXT, --prompts-file FILE, --chat, --serve HOST:PORT"
            )
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

    @model_validator(mode="after")
    def _check_answers(self) -> Self:
        if self.prompts_file is not None and (self.num_return_sequences > 1 or self.top_logprobs):
            raise ValueError(
                "--num-return-sequences and --top-logprobs go with --prompt, not --prompts-file"
            )
        if self.stream and ((self.num_beams or 1) > 1 or self.num_return_sequences > 1):
            raise ValueError("--stream shows one answer as it comes, and goes without beams")
        if self.chat:
            self._check_chat()
        if self.serve:
            self._check_serve()
        self._check_grammar()
        return self

    def _check_grammar(self) -> None:
        """Checks that nothing else is given that a grammar doesn't go with."""
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("give one of --json-schema and --regex")
        given = {
            "--num-beams": (self.num_beams or 1) > 1,
            "--prompt-lookup": self.prompt_lookup > 0,
            "--ignore-eos": self.ignore_eos,
        }
        for flag, is_given in given.items():
            if is_given and (self.json_schema or self.regex is not None):
                raise ValueError(f"--json-schema and --regex don't go with {flag}")

    def _check_serve(self) -> None:
        """Checks that no option is given that each request of a server says for itself."""
        given = {
            "--num-beams": (self.num_beams or 1) > 1,
            "--num-return-sequences": self.num_return_sequences > 1,
            "--logprobs": self.logprobs,
            "--top-logprobs": self.top_logprobs > 0,
            "--truncate": self.truncate,
            "--json": self.as_json,
            "--json-schema": self.json_schema is not None,
            "--regex": self.regex is not None,
            "--ignore-eos": self.ignore_eos,
            "--stop": bool(self.stop),
        }
        for flag, is_given in given.items():
            if is_given:
                raise ValueError(f"{flag} doesn't go with --serve: each request says it for itself")

    def _check_chat(self) -> None:
        """Checks that no option is given that a chat has no use for."""
        given = {
            "--num-beams": (self.num_beams or 1) > 1,
            "--num-return-sequences": self.num_return_sequences > 1,
            "--top-logprobs": self.top_logprobs > 0,
            "--truncate": self.truncate,
        }
        for flag, is_given in given.items():
            if is_given:
                raise ValueError(f"{flag} has no use in a --chat")
