"""Reads data sets as their authors publish them, for the tasks of lm-evaluation-harness.

A task names a data set of the Hugging Face hub, which servers without a network can't reach. With
--data-dir the files of the authors are read in its place, and their rows get the names that the
task expects. The tasks themselves, their prompts and their metrics stay the harness's own.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm3cli.errors import DataError

Row = dict[str, Any]
_ENDINGS = (".jsonl", ".json", ".jsonl.gz")
_CHINESE = ("gaokao-", "logiqa-zh", "jec-qa")
_LETTERS = "ABCDEFG"


@dataclass(frozen=True)
class Published:
    """A data set as its authors publish it.

    Attributes:
        name: The name of its folder within --data-dir; its files may also lie there themselves.
        files: The names, without their endings, that the file of each split may have. `{name}`
            stands for the name of a part of the data set.
        row: Makes a row of the hub's data set, given a row of the file and the part's name.
    """

    name: str
    files: Mapping[str, tuple[str, ...]]
    row: Callable[[Row, str], Row] = field(default=lambda row, _part: row)


def _boolq(row: Row, _part: str) -> Row:
    """Boolq's own files have `answer`, SuperGLUE's have `label`."""
    return {**row, "label": int(row["answer"] if "answer" in row else row["label"])}


def _hellaswag(row: Row, _part: str) -> Row:
    return {**row, "label": str(row.get("label", ""))}


def _arc(row: Row, _part: str) -> Row:
    """ARC's own files have the choices within the question."""
    question = row["question"]
    if not isinstance(question, dict):
        return row
    choices = {key: [one[key] for one in question["choices"]] for key in ("text", "label")}
    key = {"id": row.get("id", ""), "answerKey": row["answerKey"]}
    return {**key, "question": question["stem"], "choices": choices}


def _agieval(row: Row, part: str) -> Row:
    """Asks as the authors do without shots (github.com/ruixiangcui/AGIEval, dataset_loader.py)."""
    passage, options = row.get("passage") or "", row.get("options") or []
    question, is_chinese = f"{passage}{{}}{row['question']}", part.startswith(_CHINESE)
    if not options:
        start, cue = ("问题：", "\n答案：") if is_chinese else ("Q: ", "\nA: The answer is")
        return {"query": question.format(start) + cue, "answer": row.get("answer")}
    count = len(options) if len(options) > 1 else (4 if is_chinese else 5)
    last, listed = _LETTERS[count - 1], " ".join(options)
    if is_chinese:
        query = f"{question.format('问题：')} 选项：{listed}\n答案：从A到{last}, 我们应选择"
    else:
        query = f"{question.format('Q: ')} Answer Choices: {listed}\n"
        query += f"A: Among A through {last}, the answer is"
    label = row["label"]
    right = label if isinstance(label, list) else [*label]
    return {"query": query, "choices": options, "gold": [_LETTERS.index(one) for one in right]}


_SPLITS = {"train": ("train",), "validation": ("dev", "val", "validation"), "test": ("test",)}
# By the path of the hub's data set, or by its beginning.
_DATA_SETS = {
    "aps/super_glue": Published("boolq", _SPLITS, _boolq),
    "Rowan/hellaswag": Published(
        "hellaswag",
        {
            "train": ("hellaswag_train", "train"),
            "validation": ("hellaswag_val", "val", "validation"),
            "test": ("hellaswag_test", "test"),
        },
        _hellaswag,
    ),
    "allenai/ai2_arc": Published(
        "arc",
        {
            "train": ("{name}-Train", "{name}/{name}-Train"),
            "validation": ("{name}-Dev", "{name}/{name}-Dev"),
            "test": ("{name}-Test", "{name}/{name}-Test"),
        },
        _arc,
    ),
    "openai/gsm8k": Published("gsm8k", {"train": ("train",), "test": ("test",)}),
    "openai/openai_humaneval": Published(
        "humaneval", {"test": ("HumanEval", "human-eval-v2-20210705")}
    ),
    "SaylorTwift/bbh": Published("bbh", {"test": ("{name}",)}),
    "hails/agieval-": Published("agieval", {"test": ("{name}",)}, _agieval),
}


@contextmanager
def read_from(folder: Path | None) -> Iterator[None]:
    """Has tasks that are loaded in a block read their data sets from a folder.

    Args:
        folder: The value of --data-dir; None changes nothing.
    """
    if folder is None:
        yield
        return
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **more: Any) -> Any:
        found = _published(path)
        return original(path, name, **more) if found is None else _read(folder, found, path, name)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def _published(path: str) -> Published | None:
    """Returns the data set that stands at a path of the hub; None for one that we don't know."""
    if path.startswith("hails/agieval-"):
        return _DATA_SETS["hails/agieval-"]
    return _DATA_SETS.get(path)


def _read(folder: Path, published: Published, path: str, name: str | None) -> Any:
    """Reads the splits of a data set.

    Raises:
        DataError: No file of it is there, or one is wrong.
    """
    from datasets import Dataset, DatasetDict

    part = path.removeprefix("hails/agieval-") if name is None else name
    splits, looked = {}, []
    for split, names in published.files.items():
        stems = [stem.format(name=part) for stem in names]
        looked += stems
        file = _find(folder, published.name, stems)
        if file is not None:
            rows = [_named(published, row, part, file) for row in _rows(file)]
            splits[split] = Dataset.from_list(rows)
    if not splits:
        raise DataError(
            f"--data-dir {folder} has no files of {published.name}: there is none of "
            f"{', '.join(looked)} ({', '.join(_ENDINGS)}) in it, in {published.name} or in data",
            "give the folder with the files as the authors publish them",
        )
    # Tasks look at all splits; one whose file isn't there has no rows.
    nothing = next(iter(splits.values())).select([])
    return DatasetDict({split: splits.get(split, nothing) for split in published.files})


def _find(folder: Path, name: str, stems: list[str]) -> Path | None:
    """Returns the first file that is there, in the folder itself or in one for the data set."""
    own = [one for one in sorted(folder.iterdir()) if one.is_dir()]
    named = [one for one in own if name in one.name.lower()]
    for place in (*named, folder):
        for inside in (place, place / "data", place / "data" / "v1"):
            for stem in stems:
                for ending in _ENDINGS:
                    if (inside / f"{stem}{ending}").is_file():
                        return inside / f"{stem}{ending}"
    return None


def _rows(file: Path) -> Iterator[Row]:
    """Yields the rows of a file: JSON Lines, a list, or BBH's object with `examples`.

    Raises:
        DataError: It is empty, or no JSON.
    """
    opened: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            text = stream.read()
        if file.suffix == ".json":
            value = json.loads(text)
            rows = value.get("examples") if isinstance(value, dict) else value
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is no JSON: {error}", "fetch the file again") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(one, dict) for one in rows):
        raise DataError(f"{file} has no rows", "fetch the file again")
    yield from rows


def _named(published: Published, row: Row, part: str, file: Path) -> Row:
    """Returns a row under the names that the task expects.

    Raises:
        DataError: A field is missing or wrong.
    """
    try:
        return published.row(row, part)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} has a row that isn't one of {published.name}: {error!r}",
            "give the file as the authors publish it",
        ) from None
