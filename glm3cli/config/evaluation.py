"""The options of the `glm3 eval` commands."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.inference import OUTPUT, InferenceConfig

BENCHMARK = "Benchmark"

Protocol = Literal["logits", "modellink"]


def beside_page(path: Path) -> Path:
    """Returns the path of a result, beside which a page is written.

    Raises:
        ValueError: It has the ending of that page.
    """
    if path.suffix == ".html":
        raise ValueError("is the name of the page; give that of the JSON file beside it")
    return path


class EvalOutputOptions(InferenceConfig):
    """The options that all eval commands share: how many questions, and where the result goes."""

    limit: Annotated[int | None, Flag(panel=BENCHMARK)] = Field(
        default=None, ge=1, description="Only the first N questions of each; not a score then."
    )
    batch_size: Annotated[int, Flag(panel=BENCHMARK)] = Field(
        default=32, ge=1, description="Most prompts that one model copy runs at once."
    )
    output: Annotated[Path, Flag(panel=OUTPUT, metavar="FILE", is_written=True)] = Field(
        default=Path("results.json"), description="File for the result."
    )
    as_json: Annotated[bool, Flag(name="json", panel=OUTPUT)] = Field(
        default=False, description="Print the result as one JSON object instead of a table."
    )

    @field_validator("output")
    @classmethod
    def _check_output(cls, path: Path) -> Path:
        return beside_page(path)


class QuestionOptions(EvalOutputOptions):
    """The options of all benchmarks that ask questions one by one."""

    shots: Annotated[int, Flag(panel=BENCHMARK)] = Field(
        default=5, ge=0, description="Solved questions of the dev split in front of each question."
    )
    subjects: Annotated[str | None, Flag(panel=BENCHMARK, metavar="NAME,...")] = Field(
        default=None, description="Only these subjects; all unless given."
    )
    chat_template: Annotated[bool, Flag(panel=BENCHMARK)] = Field(
        default=False,
        description="Ask by the turns of a chat: shots and question are a user's, the model "
        "answers after the cue.",
    )
    rotate_choices: Annotated[bool, Flag(panel=BENCHMARK)] = Field(
        default=False,
        description="Ask each question once more for each letter, with its options moved up: "
        "shows what their places do.",
    )
    resume: Annotated[bool, Flag(panel=OUTPUT)] = Field(
        default=False, description="Go on where a run that was cut off left its --output."
    )

    @property
    def subject_names(self) -> tuple[str, ...]:
        """The names of the subjects to ask; empty for all subjects."""
        return _names(self.subjects)


class EvalConfig(QuestionOptions):
    """The options of a multiple-choice benchmark on a folder of CSV files."""

    data_dir: Annotated[Path, Flag(panel=BENCHMARK, metavar="DIR")] = Field(
        description="Folder of the benchmark: one folder of CSV files per split."
    )


class MmluConfig(EvalConfig):
    """The options of `glm3 eval mmlu`, which has two protocols."""

    protocol: Annotated[Protocol, Flag(panel=BENCHMARK)] = Field(
        default="logits",
        description="logits: likeliest of the four letters, prompts as in Hendrycks' code; "
        "modellink: first generated token, prompts as in ModelLink 1.1.",
    )


class CustomConfig(QuestionOptions):
    """The options of `glm3 eval custom`, whose questions are one's own."""

    file: Annotated[Path, Flag(positional=True, metavar="FILE.jsonl")] = Field(
        description="JSON Lines with a question, its choices if it has any, and the answer."
    )
    shots: Annotated[int, Flag(panel=BENCHMARK)] = Field(
        default=0, ge=0, description="Solved questions of --shots-file in front of each question."
    )
    shots_file: Annotated[Path | None, Flag(panel=BENCHMARK, metavar="FILE.jsonl")] = Field(
        default=None, description="Solved questions, in the same form."
    )
    header: Annotated[str, Flag(panel=BENCHMARK)] = Field(
        default="", description="Text in front of all; {subject} becomes the subject's name."
    )
    cue: Annotated[str, Flag(panel=BENCHMARK)] = Field(
        default="Answer:", description="Text that asks for the answer."
    )
    max_new_tokens: Annotated[int, Flag(panel=BENCHMARK)] = Field(
        default=256, ge=1, description="Longest answer to a question without choices, in tokens."
    )
    stop: Annotated[list[str], Flag(panel=BENCHMARK, metavar="TEXT")] = Field(
        default=[],
        description="End such an answer before this text; repeat for several. [a line break]",
    )
    answer_pattern: Annotated[str | None, Flag(panel=BENCHMARK, metavar="REGEX")] = Field(
        default=None, description="Take what the group of its last match holds for the answer."
    )
    ignore_case: Annotated[bool, Flag(panel=BENCHMARK)] = Field(
        default=False, description="Count an answer as right if only its capitals differ."
    )

    @model_validator(mode="after")
    def _check_custom(self) -> Self:
        if self.shots and self.shots_file is None:
            raise ValueError("--shots goes with --shots-file, from which they come")
        if self.answer_pattern is not None:
            try:
                groups = re.compile(self.answer_pattern).groups
            except re.error as error:
                raise ValueError(f"--answer-pattern {self.answer_pattern!r}: {error}") from None
            if groups != 1:
                raise ValueError(
                    f"--answer-pattern {self.answer_pattern!r} has {groups} groups, and needs one: "
                    "the answer"
                )
        return self


class NeedleConfig(EvalOutputOptions):
    """The options of `glm3 eval needle`."""

    lengths: Annotated[str | None, Flag(panel=BENCHMARK, metavar="N,...")] = Field(
        default=None,
        description="Lengths of the texts in tokens; default: doubling from 256 up to the model's "
        "positions.",
    )
    depths: Annotated[str, Flag(panel=BENCHMARK, metavar="N,...")] = Field(
        default="0,25,50,75,100", description="Places of the needle, in percent of the text."
    )
    needles: Annotated[int, Flag(panel=BENCHMARK)] = Field(
        default=4, ge=1, description="Needles at each length and depth."
    )
    haystack: Annotated[Path | None, Flag(panel=BENCHMARK, metavar="FILE")] = Field(
        default=None, description="Text around the needles, line by line; made up unless given."
    )
    seed: Annotated[int, Flag(panel=BENCHMARK)] = Field(
        default=42, ge=0, description="Same seed, same texts."
    )

    @property
    def length_numbers(self) -> tuple[int, ...]:
        """The lengths; none where they follow the model."""
        return _numbers(self.lengths)

    @property
    def depth_numbers(self) -> tuple[int, ...]:
        """The depths."""
        return _numbers(self.depths)

    @field_validator("lengths", "depths")
    @classmethod
    def _check_numbers(cls, text: str | None) -> str | None:
        if text is not None and not _numbers(text):
            raise ValueError("give at least one number")
        return text

    @model_validator(mode="after")
    def _check_depths(self) -> Self:
        if max(self.depth_numbers) > 100:
            raise ValueError(f"--depths {self.depths}: a depth is a percentage from 0 to 100")
        return self


class CompareConfig(Settings):
    """The options of `glm3 eval compare`."""

    first: Annotated[Path, Flag(positional=True, metavar="A.json")] = Field(
        description="Result of one model."
    )
    second: Annotated[Path, Flag(positional=True, metavar="B.json")] = Field(
        description="Result of the other model on the same questions."
    )
    output: Annotated[Path, Flag(panel=OUTPUT, metavar="FILE", is_written=True)] = Field(
        default=Path("compare.json"), description="File for the comparison."
    )
    as_json: Annotated[bool, Flag(name="json", panel=OUTPUT)] = Field(
        default=False, description="Print the comparison as one JSON object instead of a table."
    )

    @field_validator("output")
    @classmethod
    def _check_output(cls, path: Path) -> Path:
        return beside_page(path)


class HarnessConfig(EvalOutputOptions):
    """The options of `glm3 eval harness`: which tasks of lm-evaluation-harness to run, and how."""

    tasks: Annotated[str, Flag(panel=BENCHMARK, metavar="NAME,...")] = Field(
        description="Tasks or groups of lm-evaluation-harness."
    )
    num_fewshot: Annotated[int | None, Flag(panel=BENCHMARK)] = Field(
        default=None, ge=0, description="Solved examples per prompt; default: as each task says."
    )
    include_path: Annotated[Path | None, Flag(panel=BENCHMARK, metavar="DIR")] = Field(
        default=None, description="Folder with task YAML files of your own."
    )
    data_dir: Annotated[Path | None, Flag(panel=BENCHMARK, metavar="DIR")] = Field(
        default=None,
        description="Folder with the files of boolq, hellaswag, arc, gsm8k, humaneval, agieval and "
        "bbh as their authors publish them, read in place of the hub.",
    )
    run_code: Annotated[bool, Flag(panel=BENCHMARK)] = Field(
        default=False,
        description="Run the code that the model writes for tasks such as humaneval: in processes "
        "with limits and no network.",
    )
    chat_template: Annotated[bool, Flag(panel=BENCHMARK)] = Field(
        default=False, description="Ask by the turns of a chat; each solved example is two."
    )
    system: Annotated[str | None, Flag(panel=BENCHMARK)] = Field(
        default=None, description="System prompt of --chat-template, or text before prompts."
    )
    use_cache: Annotated[Path | None, Flag(panel=OUTPUT, metavar="FILE")] = Field(
        default=None,
        description="Keep answers in FILE_rank0.db, the harness's cache; a run that was cut off "
        "goes on from there.",
    )
    log_samples: Annotated[bool, Flag(panel=OUTPUT)] = Field(
        default=True, description="Save the answer to every question, too."
    )

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: str) -> str:
        if not _names(tasks):
            raise ValueError("give at least one task, separated by commas")
        return tasks

    @field_validator("include_path", "data_dir")
    @classmethod
    def _check_include_path(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError("there is no such folder")
        return path

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks, each once, in the order in which they were given."""
        return _names(self.tasks)


def _numbers(text: str | None) -> tuple[int, ...]:
    """Returns the whole numbers of a list with commas, each once.

    Raises:
        ValueError: Something in it is no whole number of at least 0.
    """
    names = _names(text)
    if wrong := [name for name in names if not name.isdecimal()]:
        raise ValueError(f"{wrong[0]!r} is no whole number")
    return tuple(int(name) for name in names)


def _names(text: str | None) -> tuple[str, ...]:
    """Splits a list at its commas; returns each name once, without spaces around it."""
    names = [name.strip() for name in (text or "").split(",")]
    return tuple(dict.fromkeys(name for name in names if name))
