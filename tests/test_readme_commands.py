"""Every command of the README runs up to its work, on stand-ins for the files that it names.

Training commands are run with --dry-run, and `preprocess` shows a sample of its input. The others
stop where the work would begin: parsed, checked by their config, and against the files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer
import yaml
from typer.testing import CliRunner

from glm3cli.checkpoint.convert import adapter as adapter_conversion
from glm3cli.checkpoint.convert import convert as conversion
from glm3cli.checkpoint.convert import inspect as inspection
from glm3cli.cli import doctor
from glm3cli.cli.app import app
from glm3cli.config.presets import PRESETS
from glm3cli.demo import chain
from glm3cli.demo.content import training_rows
from glm3cli.device.doctor import diagnose
from glm3cli.errors import ConfigError, Glm3Error
from glm3cli.infer import opening
from tests.support.exam import write_exam
from tests.support.project import make_project
from tests.support.readme import PAGES, Call, calls, launch_as_markdown, num_calls

# Also what stands at the head of the launcher, for machines that are started otherwise.
TEXTS = (*PAGES.values(), launch_as_markdown())
CALLS = list(dict.fromkeys(call for text in TEXTS for call in calls(text)))
TRAINING = {"pretrain", "finetune"}
INFERENCE = {"generate", "eval"}
# What is not run: where the work of a command begins.
WORK = {
    (conversion, "convert"): "convert",
    (adapter_conversion, "convert_adapter"): "convert",
    (inspection, "inspect"): "convert",
    (opening, "run_here"): "ranks",
    (diagnose, "diagnose"): "doctor",
    (doctor, "run_here"): "doctor",  # of --numerics
    (chain, "run_demo"): "demo",
}


class WorkBegins(Exception):
    """All checks are passed."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the README's commands name.

    Models have the shape of ChatGLM3-6B and no weights: the checks before the work read shapes.
    """
    project = make_project(tmp_path_factory.mktemp("project"))
    desk = tmp_path_factory.mktemp("desk")
    for name in ("chatglm3-6b", "tuned"):
        write_model(desk / name, project.tokenizer)
    (desk / "mg/mp_rank_00_000").mkdir(parents=True)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(desk / "chatglm3-6b" / name, desk / "mg")
    (desk / "ADAPTER").mkdir()
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["dense"]}
    (desk / "ADAPTER/adapter_config.json").write_text(json.dumps(adapter))
    rows = [{**row, "text": row["output"]} for row in training_rows()[:20]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), desk / "alpaca.parquet")
    for prefix, name in (("text_text", "alpaca_text"), ("task", "alpaca")):
        for file in project.folder.glob(f"{prefix}_*.[bi][id][nx]"):
            shutil.copy(file, desk / file.name.replace(prefix, name, 1))
    write_exam(desk / "mmlu/data", {"law": 2})
    run = {"model": "mg", "data": "alpaca_text_document", "save": "run", "pp": 2}
    sizes = {"train_iters": 2000, "seq_length": 8192, "global_batch_size": 128}
    (desk / "run.yaml").write_text(yaml.safe_dump(run | sizes))
    return desk


def write_model(folder: Path, tokenizer: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PRESETS["6b"].to_hf()))
    (folder / "model.safetensors").write_bytes(b"")
    shutil.copy(tokenizer / "tokenizer.model", folder)


@pytest.fixture
def run(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a call in a fresh copy of the desk, up to its work."""
    shutil.copytree(desk, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    for (module, name), command in WORK.items():
        monkeypatch.setattr(module, name, _begin(command))

    def go(call: Call) -> None:
        words = [*call.words]
        if call.world_size is not None:
            monkeypatch.setenv("WORLD_SIZE", str(call.world_size))
        if words[0] in TRAINING and "--dry-run" not in words:
            words.append("--dry-run")
        if words[0] == "preprocess":
            words += ["--preview", "1"]
        if words[0] == "convert":
            remove_target(words)
        result = CliRunner().invoke(app, words)
        if isinstance(result.exception, WorkBegins):
            assert result.exception.args[0] == ("ranks" if words[0] in INFERENCE else words[0])
        elif "--help" in words:
            assert result.stdout.lstrip().startswith("Usage: ")
        elif result.exception is not None:
            raise AssertionError(f"{call.line}: {result.output}") from result.exception
        else:
            assert words[0] in TRAINING | {"preprocess"}, call.line
            assert result.stdout

    return go


def _begin(command: str) -> Any:
    def begin(*_args: Any, **_options: Any) -> None:
        raise WorkBegins(command)

    return begin


def remove_target(words: list[str]) -> None:
    """What a conversion writes isn't there yet."""
    group: Any = typer.main.get_command(app).commands["convert"]  # type: ignore[attr-defined]
    if words[1] not in group.commands:
        return  # the call itself says so
    context = group.commands[words[1]].make_context("glm3", words[2:], resilient_parsing=True)
    target = context.params.get("target")
    if target is not None and Path(target).exists():
        shutil.rmtree(target)


def test_no_call_of_the_readme_is_left_out():
    assert len(calls()) == num_calls() > 15
    assert all(len(calls(text)) == num_calls(text) > 1 for text in TEXTS)


STEPS = """doctor, convert hf2mg, preprocess, pretrain, finetune, generate, eval mmlu,
convert mg2hf, demo""".replace("\n", " ").split(", ")


@pytest.mark.parametrize("command", STEPS)
def test_every_step_of_the_user_guide_is_shown(command):
    assert [call for call in CALLS if " ".join(call.words).startswith(command)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.line[:80])
def test_every_call_runs_up_to_its_work(call, run):
    run(call)


TORCHRUN = "torchrun --nproc_per_node 8 -m glm3cli "
PRETRAIN = "pretrain --model mg --data alpaca_text_document --save run --train-iters 9 "


def call_of(line: str) -> Call:
    (call,) = calls(f"```bash\n{line}\n```\n")
    return call


def test_calls_are_found_wherever_they_stand():
    text = """
Type `glm3 doctor`, or `glm3 X`, or `glm3
eval mmlu`, not glm3 generate.

```bash
cd x && A=1 glm3 demo --keep "a # b" ; ls # glm3cli
srun -n 2 torchrun --nnodes "$N" --nproc_per_node 4 --rdzv-endpoint "$(hosts | head -n 1):1" \\
    -m glm3cli pretrain --config run.yaml
python -m glm3cli finetune --pp 2
torchrun --nproc_per_node 4 train.py
```
"""
    assert [(call.words, call.world_size) for call in calls(text)] == [
        (("demo", "--keep", "a # b"), None),
        (("pretrain", "--config", "run.yaml"), 8),
        (("finetune", "--pp", "2"), None),
        (("doctor",), None),
        (("eval", "mmlu"), None),
    ]
    assert num_calls(text) == 5


def test_what_torchrun_refuses_is_found():
    with pytest.raises(SystemExit):
        calls(f"`{TORCHRUN.replace('--nproc_per_node', '--nproc-per-machine')}demo`")


def test_the_calls_that_follow_are_right_but_for_their_mistake(run):
    run(call_of(f"{TORCHRUN}{PRETRAIN}--pp 2 --dtype fp16"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("glm3 convert hf2mg chatglm3-6b new --tpp 2", "No such option"),
        ("glm3 convert hf2mg chatglm3-6b", "Missing argument"),
        ("glm3 convert hf2hf chatglm3-6b new", "No such command"),
        (f"{TORCHRUN}{PRETRAIN}--dtype fp17", "fp17"),
        (f"{TORCHRUN}{PRETRAIN}--pp two", "two"),
    ],
)
def test_a_mistake_is_found(line, told, run):
    with pytest.raises(AssertionError, match=told):
        run(call_of(line))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("glm3 convert hf2mg chatglm3-6b new --pp 3", "not divisible by --pp 3"),
        (f"{TORCHRUN}{PRETRAIN}--pp 16", "not divisible by --pp 16"),
        (f"{TORCHRUN}{PRETRAIN}--global-batch-size 9", "not a multiple"),
        ("glm3 preprocess --input x.csv --tokenizer mg --output-prefix x --handler text", "x.csv"),
        ("glm3 generate --model tuned --pp 2 --prompt x", "can't hold"),
        ("glm3 eval mmlu --model tuned --data-dir gone", "does not exist"),
        ("glm3 eval mmlu --model tuned --data-dir mmlu/data --shots 9", "has 5 rows"),
        (f"{TORCHRUN}{PRETRAIN.replace('alpaca_text', 'gone')}", "does not exist"),
    ],
)
def test_what_a_check_refuses_is_found(line, rule, run):
    with pytest.raises(AssertionError) as caught:
        run(call_of(line))
    error = caught.value.__cause__
    assert isinstance(error, Glm3Error)
    assert rule in error.message


def test_a_run_file_with_an_unknown_key_is_found(run):
    path = Path("run.yaml")
    path.write_text(path.read_text() + "sequence_len: 1\n")
    with pytest.raises(AssertionError) as caught:
        run(call_of("glm3 pretrain --config run.yaml --nproc 2"))
    assert isinstance(caught.value.__cause__, ConfigError)
