"""The options of the `glm3 eval` commands: benchmarks on CSV files, and lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from glm3cli.config.base import Flag
from glm3cli.config.inference import OUTPUT, InferenceConfig

BENCHMARK = "Benchmark"

Protocol = Literal["logits", "modellink"]


class EvalOutputOptions(InferenceConfig):
    """The options that all eval commands share: how many questions, and where the result goes."""

    limit: Annotated[int | None, Flag(panel=BENCHMARK)] = Field(
        default=None, ge=1, description="Only the first N questions of each; not a score then."
    )
    batch_size: Annotated[int, Flag(panel=BENCHMARK)] = Field(
        default=32, ge=1, description="Most prompts that one model copy runs at once."
    )
    output: Annotated[Path, Flag(panel=OUTPUT, metavar="FILE")] = Field(
        default=Path("results.json"), description="File for the result."
    )
    as_json: Annotated[bool, Flag(name="json", panel=OUTPUT)] = Field(
        default=False, description="Print the result as one JSON object instead of a table."
    )

    @field_validator("output")
    @classmethod
    def _check_output(cls, path: Path) -> Path:
        # Found out now, not after hours of evaluation.
        if path.is_dir():
            raise ValueError("is a folder; give the name of a file")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"the folder {path.parent} does not exist")
        return path


class EvalConfig(EvalOutputOptions):
    """The options of a multiple-choice benchmark on a folder of CSV files."""

    data_dir: Annotated[Path, Flag(panel=BENCHMARK, metavar="DIR")] = Field(
        description="Folder of the benchmark: one folder of CSV files per split."
    )
    shots: Annotated[int, Flag(panel=BENCHMARK)] = Field(
        default=5, ge=0, description="Solved questions of the dev split in front of each question."
    )
    subjects: Annotated[str | None, Flag(panel=BENCHMARK, metavar="NAME,...")] = Field(
        default=None, description="Only these subjects; all unless given."
    )
    resume: Annotated[bool, Flag(panel=OUTPUT)] = Field(
        default=False, description="Go on where a run that was cut off left its --output."
    )

    @property
    def subject_names(self) -> tuple[str, ...]:
        """The names of the subjects to ask; empty for all subjects."""
        return _names(self.subjects)


class MmluConfig(EvalConfig):
    """The options of `glm3 eval mmlu`, which has two protocols."""

    protocol: Annotated[Protocol, Flag(panel=BENCHMARK)] = Field(
        default="logits",
        description="logits: likeliest of the four letters, prompts as in Hendrycks' code; "
        "modellink: first generated token, prompts as in ModelLink 1.1.",
    )


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

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: str) -> str:
        if not _names(tasks):
            raise ValueError("give at least one task, separated by commas")
        return tasks

    @field_validator("include_path")
    @classmethod
    def _check_include_path(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError("there is no such folder")
        return path

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks, each once, in the order in which they were given."""
        return _names(self.tasks)


def _names(text: str | None) -> tuple[str, ...]:
    """Splits a list at its commas; returns each name once, without spaces around it."""
    names = [name.strip() for name in (text or "").split(",")]
    return tuple(dict.fromkeys(name for name in names if name))
