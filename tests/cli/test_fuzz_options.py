"""No combination of options ends in a traceback: each is done, or refused by a sentence."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm3cli.cli.app import app
from glm3cli.config.base import Settings
from glm3cli.config.convert import AdapterOptions, InspectConfig, ToHfConfig, ToMegatronConfig
from glm3cli.config.evaluation import MmluConfig
from glm3cli.config.inference import GenerateConfig
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.config.training import FinetuneConfig, PretrainConfig
from glm3cli.errors import StoppedError
from tests.support.exam import write_exam
from tests.support.project import Project, call

# The options of each command, and how often they are drawn: 10,000 times in all.
COMMANDS: dict[str, tuple[type[Settings], int]] = {
    "pretrain": (PretrainConfig, 2000),
    "finetune": (FinetuneConfig, 2000),
    "generate": (GenerateConfig, 2000),
    "eval mmlu": (MmluConfig, 1000),
    "preprocess": (PreprocessConfig, 1500),
    "convert hf2mg": (ToMegatronConfig, 500),
    "convert mg2hf": (ToHfConfig, 500),
    "convert mg2mg": (ToMegatronConfig, 200),
    "convert adapter": (AdapterOptions, 200),
    "convert inspect": (InspectConfig, 100),
}
NUMBERS = [
    *("0", "1", "-1", "2", "3", "7", "8", "1000", "1_000", " 1", "\uff10", "0x10", "1.0", "0.5"),
    *("4294967295", "4294967296", "9223372036854775808", "9" * 30, "9" * 5000),
    *("1e-320", "1e-45", "1e-5", "1e308", "1e400", "nan", "inf", "-inf", "-0.0"),
]
TEXTS = [
    *("", " ", "~", "a", "-", "--", "%s", "{}", "[", "*", "[a-", "a,b", ",", "a\nb", "\x1b[0m"),
    *("数" * 90, "a" * 300, "\udcff", "auto", "never", "yes", "null", "(", "\\", "1:2", "2:1"),
    *("1,2", "1,1,1", "0,0,0", "9,1", "1e9,0,0", "0.5:a", "64GB", "0GB", "1e9TB", "9" * 400 + "GB"),
]
_COMMANDS: Any = typer.main.get_command(app)
SENTENCES = {0, 2, 3, 4, 143}  # the exit codes that stand for a result or a sentence


@dataclass(frozen=True)
class Place:
    """What the commands work on.

    Attributes:
        base: The words of a command that would work, by the command.
        paths: Paths to files and folders of many kinds, and to nothing.
        config: The file of `--config`, which may be written.
    """

    base: dict[str, list[str]]
    paths: list[str]
    config: Path


@pytest.fixture(scope="module")
def place(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("fuzz")
    for name, content in {
        "empty": b"",
        "bytes.bin": bytes(range(256)),
        "gbk.jsonl": "{'text': '湖'}".encode("gbk"),
        "deep.json": b"[" * 5000,
        "deep.yaml": b"[" * 5000,
        "long.json": b"9" * 5000,
        "a.txt": b"a\n",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to(folder / "nothing")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_bytes(b"[" * 5000)
    (folder / "model/model.safetensors").write_bytes(b"\0" * 7)
    exam = write_exam(folder / "exam", {"anatomy": 2})
    model, save = str(project.model), str(folder / "run")
    train = ["--model", model, "--save", save, "--train-iters", "5", "--seq-length", "16"]
    target = str(folder / "new")
    base = {
        "pretrain": [*train, "--data", str(project.text)],
        "finetune": [*train, "--data", str(project.task)],
        "generate": ["--model", model, "--prompt", "a"],
        "eval mmlu": ["--model", model, "--data-dir", str(exam), "--output", str(folder / "r")],
        "preprocess": [
            *("--input", str(project.folder / "text.jsonl"), "--tokenizer", model),
            *("--output-prefix", str(folder / "out")),
        ],
        "convert hf2mg": [model, target],
        "convert mg2hf": [model, target],
        "convert mg2mg": [model, target],
        "convert adapter": [model, target, "--model", model, "--layout", "glm"],
        "convert inspect": [model],
    }
    paths = [str(path) for path in folder.iterdir()] + [
        *(str(project.tokenizer), str(project.text), str(project.folder / "text.jsonl")),
        *(str(folder / "nothing"), str(folder / "a.txt/b"), "/dev/null", "/proc/self/status"),
        *("~/nothing", "~nobody-of-this-name/a", "mmlu=~nobody-of-this-name/a", f"{folder}/*"),
        *(f"{folder}/link/a", "/" + "a/" * 3000, f"0.5:{project.text}"),
    ]
    return Place(base, paths, folder / "config.yaml")


def stop(*_: Any, **__: Any) -> NoReturn:
    raise StoppedError("the work would begin")


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends every command where its checks end and its work begins."""
    from glm3cli.plan.fit import check_memory
    from glm3cli.train.prepare import prepare

    def check(config: Any, kind: Any, *_: Any) -> None:
        check_memory(config, prepare(config, kind).model)
        stop()

    # Made once: typer would make all commands anew at every call.
    monkeypatch.setattr("glm3cli.cli.app.app", _COMMANDS)
    monkeypatch.setattr("glm3cli.train.start.train", check)
    monkeypatch.setattr("glm3cli.forecast.dry_run._forecast", lambda *_: "")
    monkeypatch.setattr("glm3cli.infer.opening.run_here", stop)
    monkeypatch.setattr("glm3cli.data.preprocess.run.preprocess", stop)
    monkeypatch.setattr("glm3cli.checkpoint.convert.convert.convert", stop)
    monkeypatch.setattr("glm3cli.checkpoint.convert.adapter.convert_adapter", stop)


def find_command(name: str) -> Any:
    found = _COMMANDS
    for word in name.split():
        found = found.commands[word]
    return found


def parts_of(annotation: Any) -> list[Any]:
    """Returns the types and the literals of which a field's type is made."""
    parts = get_args(annotation)
    return [one for part in parts for one in parts_of(part)] if parts else [annotation]


def value_of(annotation: Any, paths: list[str]) -> st.SearchStrategy[str]:
    """Draws values for an option, of its own kind more often than of others."""
    drawn = [st.sampled_from(paths), st.sampled_from(TEXTS), st.sampled_from(NUMBERS)]
    parts = parts_of(annotation)
    choices = [part for part in parts if isinstance(part, str)]
    if choices:
        drawn += [st.sampled_from(choices)] * 3
    elif int in parts or float in parts:
        drawn += [st.sampled_from(NUMBERS), st.integers(-9, 99).map(str)] * 2
    elif Path in parts:
        drawn += [st.sampled_from(paths)] * 3
    else:
        drawn += [st.text(string.printable, max_size=8), st.text(max_size=4)]
    return st.one_of(drawn).filter(lambda text: "\0" not in text)


def words_of(name: str, place: Place) -> st.SearchStrategy[list[str]]:
    """Draws the words of a command: what would work, and up to three options more."""
    fields = COMMANDS[name][0].model_fields
    options = [
        parameter
        for parameter in find_command(name).params
        if parameter.opts[0].startswith("--") and parameter.opts[0] not in ("--help", "--config")
    ]

    def word(parameter: Any) -> st.SearchStrategy[list[str]]:
        spellings = [*parameter.opts, *parameter.secondary_opts]
        if getattr(parameter, "is_flag", False):
            return st.sampled_from([[one.strip()] for one in spellings])
        flags = st.sampled_from(spellings)
        annotation = fields[parameter.name].annotation
        return st.tuples(flags, value_of(annotation, place.paths)).map(list)

    more = st.lists(st.sampled_from(options).flatmap(word), min_size=1, max_size=3)
    return more.map(lambda parts: [*place.base[name], *(one for part in parts for one in part)])


def from_file(words: list[str], place: Place) -> list[str]:
    """Moves the options of a command's words, those with one value, into a file of --config."""
    positional, values, rest = [], {}, list(words)
    while rest:
        first = rest.pop(0)
        if not first.startswith("--"):
            positional.append(first)
        elif rest and not rest[0].startswith("--"):
            values[first.removeprefix("--")] = rest.pop(0)
        else:
            positional.append(first)
    try:
        place.config.write_text(yaml.safe_dump(values), "utf-8")
    except (UnicodeEncodeError, yaml.YAMLError):
        return words
    return [*positional, "--config", str(place.config)]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_options_end_in_a_traceback(name: str, place: Place) -> None:
    @settings(
        max_examples=COMMANDS[name][1],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data(), st.booleans())
    def check(data: Any, is_in_file: bool) -> None:
        words = data.draw(words_of(name, place))
        if is_in_file:
            words = from_file(words, place)
        ended = call(*name.split(), *words)
        assert ended.code in SENTENCES, ended.err
        assert "Traceback" not in ended.err
        if ended.code:
            assert ended.err.strip(), "nothing is said"

    run: Callable[[], None] = check
    run()
