"""`PreprocessConfig`: the options of `glm3 preprocess`."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.split import Split

PIPE = Path("-")  # the input that stands for stdin
TEXT, PACKED, INDEX = "Text", "Conversations and preferences", "Sample indices"
PARTS = "Several machines"

# The kind of each handler, by its name: it makes one text of a row, one conversation, a pair of a
# chosen and a rejected answer, or an answer that was liked or not.
Kind = Literal["text", "instruction", "chat", "preference", "feedback"]
HANDLERS: dict[str, Kind] = {
    "text": "text",
    "instruction": "instruction",
    "chat": "chat",
    "preference": "preference",
    "feedback": "feedback",
    # ModelLink 1.1's names
    "GeneralPretrainHandler": "text",
    "AlpacaPretrainHandler": "text",
    "StackOverflowPythonPretrainHandler": "text",
    "GeneralInstructionHandler": "instruction",
    "BelleMultiTurnInstructionHandler": "instruction",
    "MOSSInstructionHandler": "instruction",
    "LeetcodePythonInstructionHandler": "instruction",
    "MOSSMultiTurnHandler": "chat",
}
# The options that a merge takes notice of.
_OF_MERGE = {"merge", "more_input", "output_prefix", "force", "log_interval", "as_json"}
# ModelLink's names for handlers of ours.
_SAME = {"GeneralPretrainHandler": "text", "GeneralInstructionHandler": "instruction"}


class PreprocessConfig(Settings):
    """The options of `glm3 preprocess`: what to read, how to tokenize it, and where to write."""

    input: Annotated[list[Path], Flag(metavar="PATH")] = Field(
        default=[],
        description="File, folder or quoted glob; may repeat. - is a pipe of JSON or text lines.",
    )
    more_input: Annotated[list[Path], Flag(positional=True, metavar="PATH")] = Field(
        default=[], description="Further inputs, so that --input takes several paths."
    )
    tokenizer: Annotated[Path | None, Flag(("--tokenizer-name-or-path",), metavar="PATH")] = Field(
        default=None, description="Model folder that has a tokenizer.model, or that file."
    )
    output_prefix: Annotated[Path, Flag(metavar="PREFIX")] = Field(
        description="Start of the output files' names."
    )
    handler: Annotated[str, Flag(("--handler-name",), metavar="NAME")] = Field(
        default="text",
        description="text, instruction, chat, preference, feedback, or a ModelLink handler's name.",
    )
    append_eod: bool = Field(
        default=False,
        description="End every text and every modellink answer with the end token.",
    )
    workers: int | None = Field(
        default=None, ge=1, description="Processes that tokenize; all cores unless given."
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop",
        description="What a bad row does: end the run, or go into PREFIX.errors.jsonl.",
    )
    preview: int = Field(
        default=0, ge=0, description="Show this many samples token by token and write nothing."
    )
    force: bool = Field(
        default=False, description="Do it again even if the files are there, of the same input."
    )
    log_interval: int = Field(default=1000, ge=1, description="Documents between progress lines.")
    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="Print the result as one JSON object."
    )
    json_keys: Annotated[list[str], Flag(panel=TEXT, metavar="KEY,...")] = Field(
        default=["text"], description="Columns with text, each written to files of its own."
    )
    template: Annotated[Literal["chatglm3", "modellink"] | None, Flag(panel=PACKED)] = Field(
        default=None,
        description="Form of a conversation: modellink for instruction, else chatglm3, which is "
        "the chat format of the tokenizer's own model.",
    )
    seq_length: Annotated[int | None, Flag(panel=PACKED)] = Field(
        default=None,
        ge=8,
        description="Cut samples to this many tokens, keeping the end token; of preferences, each "
        "prompt from the left.",
    )
    pack: Annotated[bool, Flag(panel=PACKED)] = Field(
        default=False,
        description="Put several samples into a sequence of --seq-length tokens, pairs into one of "
        "twice that; attention_mask counts them.",
    )

    part: Annotated[str | None, Flag(panel=PARTS, metavar="I/N")] = Field(
        default=None,
        description="Do the I-th of N parts alone, into the folder PREFIX-part-I-of-N.",
    )
    merge: Annotated[list[Path], Flag(panel=PARTS, metavar="FOLDER")] = Field(
        default=[],
        description="Join the N parts in these folders; their settings are those of the parts.",
    )

    build_index: Annotated[bool, Flag(panel=INDEX)] = Field(
        default=False,
        description="Then build the sample indices of a pretraining that is given the same "
        "--seq-length and the following.",
    )
    train_iters: Annotated[int | None, Flag(panel=INDEX)] = Field(
        default=None, ge=1, description="Optimizer steps."
    )
    global_batch_size: Annotated[int, Flag(panel=INDEX)] = Field(
        default=8, ge=1, description="Samples of one optimizer step."
    )
    split: Annotated[Split, Flag(panel=INDEX)] = Field(
        default="949,50,1",
        description="Proportions of training, validation, and test documents.",
    )
    seed: Annotated[int, Flag(panel=INDEX)] = Field(
        default=1234, ge=0, lt=2**32, description="Seed of the data order."
    )
    eval_interval: Annotated[int | None, Flag(panel=INDEX)] = Field(
        default=None, ge=1, description="Steps between validations."
    )
    eval_iters: Annotated[int, Flag(panel=INDEX)] = Field(
        default=10, ge=1, description="Batches of one validation."
    )

    @field_validator("handler")
    @classmethod
    def _check_handler(cls, name: str) -> str:
        if name not in HANDLERS:
            near = difflib.get_close_matches(name, HANDLERS, n=1, cutoff=0.4)
            guess = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"no such handler, {guess}known are {', '.join(HANDLERS)}")
        return _SAME.get(name, name)

    @field_validator("json_keys")
    @classmethod
    def _split_keys(cls, keys: list[str]) -> list[str]:
        names = [name.strip() for key in keys for name in key.split(",")]
        if not all(names) or len(set(names)) < len(names) or any("/" in name for name in names):
            raise ValueError("give each column once, separated by commas, none empty or with a /")
        return names

    @field_validator("part")
    @classmethod
    def _check_part(cls, part: str | None) -> str | None:
        if part is not None:
            match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
            if not match or not 1 <= int(match[1]) <= int(match[2]):
                raise ValueError("give I/N, such as 1/4 for the first of four parts")
        return part

    @model_validator(mode="after")
    def _check_prefix(self) -> Self:
        if self.prefix.name in ("", "..") or self.prefix.is_dir():
            raise ValueError(
                f"--output-prefix {self.output_prefix} is a folder: add the start of a file name"
            )
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.merge:
            self._check_merge()
            return self
        if self.tokenizer is None:
            raise ValueError("--tokenizer is missing")
        if self.part and PIPE in self.inputs:
            raise ValueError("--part needs files: a pipe can't be cut into parts")
        if self.part and self.build_index:
            raise ValueError("--build-index goes with all data: leave it out until --merge is done")
        return self

    def _check_merge(self) -> None:
        """Refuses options of which a merge takes no notice."""
        fields = type(self).model_fields
        for name in self.model_fields_set - _OF_MERGE:
            if getattr(self, name) != fields[name].get_default():
                flag = str(self.flag_of(name).name).replace("_", "-")
                raise ValueError(
                    f"--{flag} doesn't go with --merge, which takes the settings of the parts"
                )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.merge:
            return self
        if not self.inputs:
            raise ValueError("--input is missing: give a file, a folder or a quoted glob")
        if self.build_index and (self.kind != "text" or not (self.seq_length and self.train_iters)):
            raise ValueError(
                "--build-index goes with texts, and needs --seq-length and --train-iters"
            )
        if self.train_iters and not self.build_index:
            raise ValueError("--train-iters goes with --build-index")
        cuts = self.seq_length and not self.build_index
        if self.kind == "text" and (cuts or self.template or self.pack):
            raise ValueError(
                "--seq-length, --template and --pack go with the handlers instruction, chat, "
                "preference and feedback; training cuts text by itself"
            )
        if self.pack and not self.seq_length:
            raise ValueError("--pack needs --seq-length, the size of a pack")
        if self.inputs.count(PIPE) > 1:
            raise ValueError("--input - can be read once only")
        return self

    @property
    def inputs(self) -> list[Path]:
        """The inputs of the options and of the positional arguments, in the order given."""
        return [*self.input, *self.more_input]

    @property
    def tokenizer_path(self) -> Path:
        """The value of --tokenizer, which every run but a merge has."""
        assert self.tokenizer is not None
        return self.tokenizer

    @property
    def part_numbers(self) -> tuple[int, int]:
        """The number of the part, from 1, and that of all parts."""
        number, _, count = (self.part or "1/1").partition("/")
        return int(number), int(count)

    @property
    def prefix(self) -> Path:
        """The start of the names of the files that this run writes.

        Those of a part are in a folder of its own, beside the files that a merge will write. The
        folder has the name of --output-prefix if that says already which part it is.
        """
        if self.part is None:
            return self.output_prefix
        number, count = self.part_numbers
        named = re.fullmatch(f"(.+)-part-0*{number}(-of-0*{count})?", self.output_prefix.name)
        if named:
            return self.output_prefix / named[1]
        name = self.output_prefix.name
        return self.output_prefix.with_name(f"{name}-part-{number}-of-{count}") / name

    @property
    def kind(self) -> Kind:
        """The kind of the handler: what it makes of a row."""
        return HANDLERS[self.handler]

    @property
    def conversation_template(self) -> Literal["chatglm3", "modellink"]:
        """The name of the conversation's template: the one given, else the handler's own."""
        return self.template or ("modellink" if self.kind == "instruction" else "chatglm3")

    @property
    def pack_length(self) -> int | None:
        """The number of tokens of a pack, which has room for a pair of longest samples."""
        if self.seq_length is None or not self.pack:
            return None
        return 2 * self.seq_length if self.kind == "preference" else self.seq_length
