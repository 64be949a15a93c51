"""`glm3 doctor --numerics` as a command: its table, its sentences, its JSON, and its exit codes."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from glm3cli.device import Device, select
from glm3cli.device.catalog import find_chip
from glm3cli.numerics import run
from glm3cli.numerics.case import Case, draw
from glm3cli.numerics.chip_file import chip_file
from glm3cli.numerics.outcome import Outcome, distance, worst
from glm3cli.numerics.speed import Speeds
from glm3cli.numerics.training_cases import training_cases
from tests.support.project import call, glm3


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves most checks out, and has one that fails beside those that don't."""

    def operators(device: Device) -> Iterator[Outcome]:
        for case in islice(training_cases(96), 2):
            yield from case.outcomes(device)
        broken = Case(
            "doubling",
            "3 numbers",
            {"numbers": draw(3)},
            lambda _, leaves: leaves["numbers"] * 2.1,
            lambda leaves: leaves["numbers"].double() * 2,
            kernel="swiglu",
        )
        yield from broken.outcomes(device)

    monkeypatch.setattr(run, "_operators", operators)
    monkeypatch.setattr(run, "sizes_for", lambda _: [])


def test_failures_are_a_table_sentences_and_exit_code_4(short: None) -> None:
    ended = call("doctor", "--numerics", "--device", "cpu")
    assert ended.code == 4
    assert "against fp64 on the host" in ended.out
    assert "RMSNorm" in ended.out
    assert "wrong: doubling, bf16 (3 numbers" in ended.out
    assert "and the limit 0.016, 4 roundings to bf16; --without-kernel swiglu computes" in ended.out
    assert "error: 3 of 9 checks failed" in ended.err
    assert "checking operators" in ended.err


def test_the_report_as_json(short: None) -> None:
    ended = call("doctor", "--numerics", "--device", "cpu", "--json")
    assert ended.code == 4
    report = json.loads(ended.out)
    assert (report["device"], report["ranks"], report["ok"]) == ("cpu", 1, False)
    verdicts = {(one["subject"], one["dtype"]): one["ok"] for one in report["checks"]}
    assert verdicts["RMSNorm", "bf16"]
    assert not verdicts["doubling", "fp16"]
    assert {"error", "limit", "why", "place", "way_out"} <= report["checks"][0].keys()


def test_a_measured_device_is_a_file_that_plans_take(
    short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds = Speeds(matrix=5e10, attention=2e10, memory=1.5e10, launch=2e-5)
    monkeypatch.setattr(run, "measure", lambda *_: speeds)
    file = tmp_path / "mine.toml"
    ended = call("doctor", "--numerics", "--device", "cpu", "--chip-file", file)
    assert "measured: 0.05 TFLOP/s in matrix products and 0.02 in attention" in ended.out
    chip = find_chip(str(file))
    assert (chip.name, chip.kind, chip.peak_tflops) == ("mine", "cpu", 0.05)
    assert (chip.attention_efficiency, chip.memory_bandwidth, chip.launch) == (0.4, 1.5e10, 2e-5)
    assert chip.link_bandwidth == find_chip("CPU").link_bandwidth
    assert "# One rank has no links: those below are of CPU in chips.toml" in file.read_text()


def test_links_are_those_of_the_slowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    fast = Speeds(1e12, 1e12, 1e11, 1e-6, latency=1e-5, link=2e9, server=5.8e9)
    slow = replace(fast, matrix=5e11, launch=3e-6, link=1.9e9)
    found = Speeds.slowest([fast.to_dict(), slow.to_dict()])
    assert (found.matrix, found.launch, found.link) == (5e11, 3e-6, 1.9e9)
    values = tomllib.loads(chip_file(Path("x.toml"), select("cpu"), 4, found))["x"]
    assert (values["link_bandwidth"], values["num_links"]) == (1.9e9, 3)
    assert (values["devices_per_server"], values["network_bandwidth"]) == (4, 1.9e9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--nproc", "2"], "--nproc is for --numerics"),
        (["--device", "cpu"], "--device is for --numerics"),
        (["--numerics", "--chip-file", "mine.json"], "whose names end in .toml"),
        (["--numerics", "--chip-file", "nowhere/mine.toml"], "the folder nowhere does not exist"),
    ],
)
def test_wrong_usage_is_a_sentence(given: list[str], message: str) -> None:
    ended = call("doctor", *given)
    assert ended.code == 2
    assert message in ended.err


def test_an_operator_that_raises_is_a_failure_with_its_words() -> None:
    def refuse(*_: object) -> object:
        raise RuntimeError("no kernel for this\nand more")

    case = Case("refusal", "one", {"numbers": draw(1)}, refuse, lambda leaves: leaves["numbers"])  # type: ignore[arg-type]
    for outcome in case.outcomes(select("cpu")):
        assert not outcome.ok
        assert (
            outcome.sentence == "refusal, " + outcome.dtype + " (one, rank 0): no kernel for this"
        )


def test_errors_that_are_no_numbers_are_the_worst() -> None:
    import torch

    right = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert distance(torch.tensor([1.0, torch.nan, 3.0]), right) == torch.inf
    assert distance(torch.ones(2), right) == torch.inf
    assert distance(right.float(), right) == 0
    errors = (0.1, 5.0, 0.2)
    found = worst(Outcome("sum", "fp32", error, 1.0, "", rank=i) for i, error in enumerate(errors))
    assert [one.rank for one in found] == [1]
    assert not Outcome("sum", "fp32", torch.nan, 1.0, "").ok


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cpu_passes(ranks: int, tmp_path: Path) -> None:
    more = ["--nproc", ranks, "--chip-file", tmp_path / "mine.toml"] if ranks > 1 else []
    # By a process of its own, whose ranks write to its stdout.
    ended = glm3(tmp_path / "log", "doctor", "--numerics", "--device", "cpu", "--json", *more)
    assert ended.code == 0, ended.out + ended.err
    report = json.loads(ended.out)
    assert report["ranks"] == ranks
    assert len(report["checks"]) > 80
    if ranks > 1:
        chip = find_chip(str(tmp_path / "mine.toml"))
        assert chip.latency > chip.launch > 0
