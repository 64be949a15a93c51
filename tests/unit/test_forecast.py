"""Predicted steps: what bounds an operator, when a pipeline's stages wait, and what a user sees."""

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.presets import PRESETS
from glm3cli.device.catalog import Chip, chips, find_chip
from glm3cli.errors import ConfigError
from glm3cli.forecast.forecast import Forecast, describe, forecast
from glm3cli.forecast.recorder import Operator
from glm3cli.forecast.roofline import Cost, cost
from glm3cli.forecast.schedule import Pass, StagePace, passes, span
from glm3cli.plan.estimate import predict
from tests.support.tiny import TINY, train_config

CHIP = Chip(
    "x",
    peak_tflops=1e-12 * 1000,
    memory_gib=1,
    memory_bandwidth=100,
    link_bandwidth=10,
    num_links=1,
    network_bandwidth=5,
    matrix_efficiency=0.5,
    launch=0.25,
    latency=1.0,
)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """As if no torchrun had started this process."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def operator(kind: Any, flops: float = 0, size: int = 0, **more: Any) -> Operator:
    return Operator("aten.x", kind, flops, size, (), **more)


# --- the roofline ---


def test_the_slower_one_of_operations_and_bytes_counts() -> None:
    assert cost(operator("matrix", flops=1000, size=100), CHIP) == Cost(2.25, "operations")
    assert cost(operator("attention", flops=1000, size=200), CHIP).seconds == 2.25
    assert cost(operator("attention", flops=1000, size=200), CHIP).bound == "memory"
    assert cost(operator("memory", size=10), CHIP).bound == "launch"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c10d.allreduce_", 1 + 2 * 0.75 * 80 / 10),
        ("c10d._allgather_base_", 1 + 0.75 * 80 / 10),
        ("c10d.reduce_scatter_tensor_coalesced_", 1 + 0.75 * 80 / 10),
        ("c10d.alltoall_base_", 1 + 0.75 * 80 / 10),
        ("c10d.broadcast_", 1 + 80 / 10),
    ],
)
def test_messages_by_their_kind(name: str, expected: float) -> None:
    message = Operator(name, "message", 0, 80, (), ranks=(0, 1, 2, 3))
    assert cost(message, CHIP).seconds == pytest.approx(expected)


def test_the_network_is_slower_and_a_rank_alone_sends_nothing() -> None:
    near, far, alone = (
        Operator("c10d.allreduce_", "message", 0, 80, (), ranks=ranks)
        for ranks in ((0, 1), (0, 8), (3,))
    )
    assert cost(far, CHIP).seconds == pytest.approx(1 + 80 / 5)
    assert cost(near, CHIP).seconds == pytest.approx(1 + 80 / 10)
    assert cost(alone, CHIP).seconds == CHIP.launch


# --- the schedule ---


def even(pp: int, vpp: int = 1, send: float = 0.0) -> list[StagePace]:
    return [StagePace([1 / vpp] * vpp, [2 / vpp] * vpp, send)] * pp


@pytest.mark.parametrize(("pp", "vpp", "count"), [(1, 1, 3), (2, 1, 4), (4, 1, 8), (4, 3, 8)])
def test_even_stages_wait_as_published(pp: int, vpp: int, count: int) -> None:
    """Narayanan et al. 2021: a stage waits for the time of (p - 1) / v micro-batches."""
    assert span(even(pp, vpp), count) == pytest.approx(3 * (count + (pp - 1) / vpp))


def test_the_order_of_1f1b() -> None:
    order = passes(0, pp=2, vpp=1, num_microbatches=3)
    assert [one.is_forward for one in order] == [True, True, False, True, False, False]
    assert order[2] == Pass(False, 0, 0)


def test_the_order_is_megatron_cores() -> None:
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    for pp, vpp, count in ((2, 2, 4), (4, 3, 8)):
        theirs = get_schedule_table(count, vpp, pp)
        ours = [one for one in passes(0, pp, vpp, count) if one.is_forward]
        assert [(one.microbatch, one.chunk) for one in ours] == list(theirs)


def test_an_uneven_stage_and_messages_cost_time() -> None:
    slow = [StagePace([1], [2]), StagePace([1.5], [3])]
    assert span(slow, 8) > span(even(2), 8)
    plain, interleaved = (span(even(4, vpp, send=0.1), 8) - span(even(4, vpp), 8) for vpp in (1, 2))
    assert plain > 16 * 0.1
    assert interleaved < plain + 1e-9  # although it sends twice as often: chunks work meanwhile


# --- whole steps ---


def planned(chip: Chip | None = None, **changes: Any) -> Forecast:
    options = {"dry_run": True, "planned_world_size": 4, "global_batch_size": 16, **changes}
    return forecast(train_config(**options), TINY, chip or find_chip("910B"))


def test_fewer_micro_batches_leave_more_bubble() -> None:
    """The work per step is the same, in one micro-batch per data parallel rank or in eight."""
    few = planned(pp=2, global_batch_size=2, micro_batch_size=1)
    many = planned(pp=2, global_batch_size=16, micro_batch_size=1)
    assert few.bubble > many.bubble > 0
    assert few.tokens_per_second < many.tokens_per_second
    assert planned(pp=1).bubble == pytest.approx(0, abs=1e-9)


def test_a_faster_device_and_hidden_messages_are_faster() -> None:
    chip = find_chip("910B")
    plain = planned(chip)
    assert planned(replace(chip, launch=0.0)).seconds < plain.seconds
    assert planned(replace(chip, latency=0.0)).seconds < plain.seconds
    hidden = planned(chip, overlap_grad_reduce=True)
    assert hidden.seconds < plain.seconds


def test_the_real_model_on_eight_cards_is_within_reach_of_the_published_rate() -> None:
    """The published rate is ModelLink's 4,611 tokens/s per device; nothing is fitted to it."""
    options = {"planned_world_size": 8, "pp": 2, "seq_length": 8192, "global_batch_size": 128}
    config = train_config(dry_run=True, dtype="bf16", **options)
    found = forecast(config, PRESETS["6b"], find_chip("910B"))
    assert 4611 < found.tokens_per_second < 1.3 * 4611
    assert found.utilisation()["mfu"] < 1
    # The formulas of plan/estimate.py are fitted to it, and order layouts the same way.
    ratio = predict(config, PRESETS["6b"], find_chip("910B")).seconds / found.seconds
    assert 1 < ratio < 1.3
    text = describe(found)
    assert "stage 1 " in text
    assert text.count("\n") == 4 + 8
    assert "aten.mm" in text


# --- devices of one's own ---


def write(folder: Path, text: str) -> str:
    file = folder / "mine.toml"
    file.write_text(text)
    return str(file)


def test_a_file_describes_a_device(tmp_path: Path) -> None:
    text = "\n".join(
        f"{key} = {value!r}"
        for key, value in vars(chips()[0]).items()
        if key not in ("name", "kind")
    )
    found = find_chip(write(tmp_path, f'[mine]\nkind = "npu"\n{text}'))
    assert found == replace(chips()[0], name="mine")


def test_a_table_of_ours_can_be_copied_into_a_file(tmp_path: Path) -> None:
    ours = resources.files("glm3cli.device").joinpath("chips.toml").read_text("utf-8")
    table = ours.partition("[A100]\n")[2].partition("\n\n")[0]
    assert "driver_names" in table
    assert find_chip(write(tmp_path, f"[mine]\n{table}")) == replace(find_chip("A100"), name="mine")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[mine]\npeak = 3", "has peak, which is no key"),
        ("[mine]\nlaunch = -1.0", "has launch, which is no key or has no fitting value"),
        ("[mine]\nlaunch = 'no'", "has launch"),
        ("[mine]\nkind = 'tpu'", "has kind"),
        ("[mine]\nmemory_bandwidth = 0", "has memory_bandwidth"),
        ("[mine]\npeak_tflops = 3", "is not complete"),
        ("[mine", "is no TOML"),
        ("", "describes 0 devices"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        find_chip(write(tmp_path, text))


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        find_chip(str(tmp_path / "none.toml"))
