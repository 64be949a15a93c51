"""`glm3 eval` from the outside: options, errors before torch, and whole runs of a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.cli import evaluate
from glm3cli.config.convert import ConvertOptions
from glm3cli.errors import ConfigError, DataError
from tests.support.adapters import adapter_tensors, write_adapter
from tests.support.exam import EXAM_MODEL, run_on_rank, write_csv, write_exam, write_exam_model
from tests.support.ranks import RankPool

PROGRAM = """
import sys
from glm3cli.cli.evaluate import app
from glm3cli.errors import Glm3Error
try:
    app()
except Glm3Error as error:
    print("error:", error.message, file=sys.stderr)
    sys.exit(error.exit_code)
finally:
    print("heavy:", sorted({"torch", "numpy", "rich.table", "lm_eval"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exam_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exam(tmp_path_factory.mktemp("exam"), {"astronomy": 5, "virology": 6})


def _glm3(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
        timeout=200,
        **more,
    )


def test_help_lists_the_benchmarks() -> None:
    result = CliRunner().invoke(evaluate.app, ["--help"])
    assert result.exit_code == 0
    for name in ("mmlu", "ceval", "cmmlu", "custom", "needle", "compare", "harness"):
        assert name in result.output
    for word in ("cluster-robust", "Wilson's", "--resume", "Exit codes"):
        assert word in result.output
    harness = " ".join(CliRunner().invoke(evaluate.app, ["harness", "--help"]).output.split())
    for word in ("as their authors publish them", "--run-code: each program"):
        assert word in harness


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data-dir", "none"], "--data-dir none does not exist"),
        (["--subjects", "astronmy"], "no subject 'astronmy', did you mean 'astronomy'?"),
        (["--shots", "6"], "--shots 6, but"),
        (["--shots", "-1"], "--shots -1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--output", "none/results.json"], "the folder none does not exist"),
        (["--output", "."], "is a folder"),
        (["--tp", "3"], "can't hold --tp 3"),
        (["--model", "none"], "none does not exist"),
    ],
)
def test_errors_come_before_torch(
    model: Path, exam: Path, options: list[str], sentence: str
) -> None:
    result = _glm3("mmlu", "--model", model, "--data-dir", exam, *options)
    assert result.returncode in (2, 3)
    assert sentence in result.stderr
    assert result.stdout == "heavy: []\n"


def test_protocol_is_mmlus_alone(model: Path, exam: Path) -> None:
    result = CliRunner().invoke(evaluate.app, ["ceval", "--protocol", "modellink"])
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_wrong_tables_raise(model: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "test" / "x_test.csv", [("1", "2")])
    runner = CliRunner()
    arguments = ["mmlu", "--model", str(model), "--data-dir", str(tmp_path), "--shots", "0"]
    result = runner.invoke(evaluate.app, arguments)
    assert isinstance(result.exception, DataError)
    result = runner.invoke(evaluate.app, ["harness", "--model", str(model), "--tasks", ","])
    assert isinstance(result.exception, ConfigError)


@pytest.mark.slow
def test_table_on_stdout_lines_on_stderr(model: Path, exam: Path, tmp_path: Path) -> None:
    arguments = ("mmlu", "--model", model, "--data-dir", exam, "--device", "cpu", "--limit", "4")
    result = _glm3(*arguments, "--output", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    assert "mmlu, logits protocol, 5-shot" in result.stdout
    for name in ("astronomy", "virology", "STEM", "other", "micro average", "macro average"):
        assert name in result.stdout
    assert "Not a score: --limit left questions out." in result.stdout
    assert "55 of the benchmark's 57 subjects were not asked." in result.stdout
    lines = [line for line in result.stderr.splitlines() if "questions]" in line]
    assert len(lines) == 2
    assert lines[-1].endswith("[8 of 8 questions]")
    assert json.loads((tmp_path / "out.json").read_text())["micro"] <= 1


@pytest.mark.slow
def test_json_on_stdout(model: Path, exam: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--json", "--protocol", "modellink")
    result = _glm3("mmlu", "--model", model, "--data-dir", exam, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout.splitlines()[0])
    assert shown == json.loads((tmp_path / "results.json").read_text())
    assert shown["protocol"] == "modellink"
    assert all(isinstance(question["text"], str) for question in shown["questions"])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, num_ranks: int) -> None:
    # So large that sums differ with what they are computed beside.
    model = write_exam_model(
        tmp_path / "model", hidden_size=128, ffn_hidden_size=256, kv_channels=32
    )
    exam = write_exam(tmp_path / "exam", {"astronomy": 300, "virology": 500, "law": 200})
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "glm3cli", "eval", "mmlu", "--model", str(model)]
    command += ["--data-dir", str(exam), "--device", "cpu", "--output", str(output)]
    command += ["--nproc", str(num_ranks), "--batch-size", "8", "--resume"]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    whole = output.read_bytes()
    output.unlink()
    sidecar = tmp_path / "results.json.partial.jsonl"
    for num_answers in (200, 700):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
            while run.poll() is None and _num_lines(sidecar) <= num_answers:
                time.sleep(0.002)
            run.kill()
        assert run.returncode == -signal.SIGKILL
        assert not output.exists()
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    assert output.read_bytes() == whole


def _num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.dist
def test_an_adapter_gives_the_answers_of_the_merged_model(
    model: Path, exam: Path, tmp_path: Path, ranks: RankPool
) -> None:
    tensors = {name: 0.1 * tensor for name, tensor in adapter_tensors(model=EXAM_MODEL).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    convert(model, tmp_path / "merged", ConvertOptions(layout="chatglm", lora=adapter))
    base = {"data_dir": exam, "device": "cpu", "output": tmp_path / "out.json"}
    [expected] = ranks.run(1, run_on_rank, base | {"model": tmp_path / "merged"})
    [plain] = ranks.run(1, run_on_rank, base | {"model": model})
    for found in ranks.run(2, run_on_rank, base | {"model": model, "lora": adapter, "tp": 2}):
        for ours, theirs in zip(found["questions"], expected["questions"], strict=True):
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-4)
    assert plain["questions"][0]["scores"] != pytest.approx(
        expected["questions"][0]["scores"], abs=1e-2
    )


@pytest.mark.dist
def test_all_parallel_sizes_give_the_same_answers(
    model: Path, exam: Path, tmp_path: Path, ranks: RankPool
) -> None:
    base = {"model": model, "data_dir": exam, "device": "cpu", "output": tmp_path / "out.json"}
    alone = ranks.run(1, run_on_rank, base)[0]
    for world_size, sizes in [
        (2, {}),
        (2, {"tp": 2}),
        (2, {"pp": 2, "batch_size": 3}),
        (4, {"tp": 2, "pp": 2, "batch_size": 1}),
    ]:
        results = ranks.run(world_size, run_on_rank, base | sizes)
        for result in results:
            for ours, theirs in zip(result["questions"], alone["questions"], strict=True):
                assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
                assert ours["choice"] == theirs["choice"]
        assert json.loads(base["output"].read_text()) == results[0]
