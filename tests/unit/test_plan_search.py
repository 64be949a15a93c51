"""The search for parallel plans that fit into devices that aren't here, the fastest first."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from glm3cli.config.presets import PRESETS
from glm3cli.config.training import TrainConfig
from glm3cli.device import DEVICES
from glm3cli.device.catalog import Chip, chips, find_chip
from glm3cli.errors import ConfigError, DeviceError
from glm3cli.plan.activations import saved_by_layer
from glm3cli.plan.auto import choose
from glm3cli.plan.describe import advise
from glm3cli.plan.estimate import predict
from glm3cli.plan.fit import check_device, check_memory, saved_by_kernels
from glm3cli.plan.memory import memory_of_stage
from glm3cli.plan.search import (
    fits,
    flags,
    least_recomputing,
    none_fits,
    peak_of,
    search,
    table,
)
from tests.support.tiny import train_config

SIX_B = PRESETS["6b"]
NPU = DEVICES["npu"].saved_for_backward
CARD = find_chip("910b")
MEMORY = 64 * 10**9


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """As if no torchrun had started this process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def planned(**changes: Any) -> TrainConfig:
    """Returns the settings of the 6B model on eight devices, with sequences of 8,192 tokens."""
    options = {
        "planned_world_size": 8,
        "dry_run": True,
        "seq_length": 8192,
        "global_batch_size": 128,
        "dtype": "bf16",
        **changes,
    }
    return train_config(**options)


# --- options ---


def test_the_planned_ranks_are_the_world():
    assert planned(pp=2).dp == 4
    assert train_config(nproc=2).world_size == 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [("64GB", 64 * 10**9), ("64GiB", 64 * 2**30), ("1.5gb", 1.5e9), ("100", 100), ("8TiB", 2**43)],
)
def test_sizes_of_memory(size, expected):
    assert planned(device_memory=size).device_bytes == expected


@pytest.mark.parametrize(
    ("option", "value"), [("device_memory", "64 GB"), ("device_memory", "lots")]
)
def test_what_is_no_size_is_refused(option, value):
    with pytest.raises(ConfigError, match="--device-memory"):
        planned(**{option: value})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"planned_world_size": 8}, "--world-size is for --dry-run"),
        ({"chip": "910B"}, "--chip is for --dry-run"),
    ],
)
def test_what_only_plans_needs_a_dry_run(option, message):
    with pytest.raises(ConfigError, match=message):
        train_config(**option)


def test_a_chip_has_the_names_that_its_driver_gives_it():
    assert find_chip("910B3") == find_chip("Ascend910B4") == CARD
    assert find_chip("NVIDIA A100-SXM4-80GB") == find_chip("a100")


def test_an_unknown_chip_is_a_sentence_with_the_known_ones():
    with pytest.raises(ConfigError, match="--chip 910Z is not known") as caught:
        find_chip("910Z")
    assert caught.value.hint.startswith("use one of 910B, 910A, A100, H100")


# --- memory ---


def test_a_sequence_parallel_layer_keeps_its_share_of_everything():
    whole, half = (sum(saved_by_layer(planned(tp=tp), SIX_B, NPU).values()) for tp in (1, 2))
    assert half == pytest.approx(whole / 2)
    held = sum(saved_by_layer(planned(tp=2, sequence_parallel=False), SIX_B, NPU).values())
    assert held > half


def test_the_first_stage_has_the_most_micro_batches_in_flight():
    activations = [
        memory_of_stage(planned(pp=4), SIX_B, NPU, stage).activations for stage in range(4)
    ]
    assert activations == pytest.approx(
        [4 * activations[3], 3 * activations[3], 2 * activations[3], activations[3]]
    )
    # There are no more than the step has.
    few = planned(pp=4, global_batch_size=4)
    assert few.num_microbatches == 2
    assert memory_of_stage(few, SIX_B, NPU, 0).activations == activations[2]


def test_recomputing_more_layers_needs_less():
    peaks = [
        peak_of(
            planned(pp=2, recompute="full", recompute_method="block", recompute_num_layers=n),
            SIX_B,
            NPU,
        )
        for n in range(1, 14)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peak_of(planned(pp=2), SIX_B, NPU) > peaks[0]
    assert peak_of(planned(pp=2, recompute="full"), SIX_B, NPU) < peaks[-1]


def test_no_more_is_recomputed_than_must_be():
    config = least_recomputing(planned(pp=2), SIX_B, NPU, MEMORY)
    number = config.recompute_num_layers
    assert fits(peak_of(config, SIX_B, NPU), MEMORY)
    fewer = config.model_copy(update={"recompute_num_layers": number - 1})
    assert not fits(peak_of(fewer, SIX_B, NPU), MEMORY)
    assert least_recomputing(planned(pp=2), SIX_B, NPU, 10 * MEMORY).recompute == "none"
    assert least_recomputing(planned(), SIX_B, NPU, 1).recompute_method == "uniform"


# --- time ---


def test_the_time_of_the_6b_model_is_what_was_measured():
    # ModelLink's README gives 4,297 and, later, 4,611 tokens/s per device.
    time = predict(planned(pp=2, dtype="fp16"), SIX_B, CARD)
    assert 4297 < time.tokens_per_second < 4700
    assert time.bubble == pytest.approx(1 / 33)
    assert time.seconds == pytest.approx(128 * 8192 / 8 / time.tokens_per_second)


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        ({}, {"recompute": "full"}),
        ({"recompute": "selective"}, {"recompute": "full"}),
        ({"pp": 4, "vpp": 7}, {"pp": 4}),
        ({}, {"tp": 8}),
        ({"tp": 2}, {"tp": 2, "planned_world_size": 16, "global_batch_size": 128}),
        ({"overlap_grad_reduce": True}, {}),
        ({"micro_batch_size": 2}, {"micro_batch_size": 1}),
    ],
    ids=str,
)
def test_plans_are_in_the_order_that_one_knows(faster, slower):
    fast, slow = (predict(planned(**options), SIX_B, CARD) for options in (faster, slower))
    assert fast.tokens_per_second > slow.tokens_per_second


def test_messages_go_through_the_links_of_a_server_or_the_network():
    chip = Chip("x", 1, 1, 1, link_bandwidth=10, num_links=7, network_bandwidth=3)
    assert [chip.bandwidth(ranks, ranks) for ranks in (2, 4, 8)] == [10, 30, 70]
    assert chip.bandwidth(2, 16) == 3


# --- the search ---


def test_what_fits_is_in_order_and_does_fit():
    found = search(planned(), SIX_B, NPU, MEMORY, CARD)
    assert len(found.fitting) > 20
    assert found.others
    seconds = [plan.time.seconds for plan in found.fitting]
    assert seconds == sorted(seconds)
    for plan in found.fitting:
        plan.config.check_sizes(SIX_B)
        assert fits(plan.peak, MEMORY)
        # The options that a user copies give the same plan.
        words = flags(plan.config).replace("--", "").replace("-", "_").split()
        values = dict(zip(words[::2], words[1::2], strict=True))
        numbers = {name: int(value) for name, value in values.items() if value.isdigit()}
        assert peak_of(planned(**(values | numbers)), SIX_B, NPU) == plan.peak


def test_the_table_has_the_fastest_plans_and_counts_the_others():
    found = search(planned(), SIX_B, NPU, MEMORY, CARD)
    lines = table(found).splitlines()
    assert lines[0].startswith("layouts for 910B with 59.60 GiB, of which 10% stays free")
    assert "worst stage" in lines[1]
    assert len(lines) == 2 + 12 + 2
    assert lines[-2] == f"{len(found.fitting) - 12} more layouts fit"
    assert lines[-1] == f"{len(found.others)} layouts don't fit"


def test_where_nothing_fits_a_sentence_says_by_how_much():
    found = search(planned(), SIX_B, NPU, 8 * 10**9, CARD)
    assert not found.fitting
    peak = found.others[0][0]
    missing = (peak - 0.9 * 8e9) / 2**30
    assert none_fits(found).startswith(
        f"none of {len(found.others)} layouts fits; the smallest, --tp"
    )
    assert none_fits(found).endswith(f"{missing:.2f} GiB too much")
    assert none_fits(found) in table(found)


def test_a_batch_that_no_plan_can_share_out_is_reported():
    found = search(planned(global_batch_size=1, seq_length=8191), SIX_B, NPU, MEMORY, CARD)
    assert none_fits(found) == "no layout is possible with this --global-batch-size"


def test_a_chip_alone_brings_its_memory():
    assert "layouts for H100 with 80.00 GiB" in advise(planned(chip="h100"), SIX_B)
    assert all(chip.memory_bytes > 2**30 for chip in chips())


# --- refusals ---


def test_modellinks_plan_fits_into_its_device():
    # Its README trains tp 1, pp 2 at 8,192 tokens on NPUs with 64 GB, and recomputes nothing.
    assert fits(peak_of(planned(pp=2), SIX_B, NPU), CARD.memory_bytes)


def test_a_run_that_fits_goes_on():
    check_memory(planned(pp=2, device_memory="100GB"), SIX_B)
    check_memory(planned(), SIX_B)


def test_a_run_that_does_not_fit_is_refused_with_the_nearest_that_does():
    with pytest.raises(ConfigError, match=r"--tp 1 --pp 2 .* of a device") as caught:
        check_memory(planned(pp=2, device_memory="48GB"), SIX_B)
    hint = caught.value.hint
    assert hint.startswith("use --tp 1 --pp 2 --micro-batch-size 1 --recompute full")


def test_a_run_that_the_device_here_cannot_hold_is_refused_unless_its_memory_is_given():
    config, peak = planned(pp=2), peak_of(planned(pp=2), SIX_B, NPU)

    def left(memory: int) -> Callable[[int], int]:
        """Each of four groups takes a byte: of stages, of copies, of a copy, and of all ranks."""
        return lambda num_groups: memory + 4 - num_groups

    assert check_device(config, SIX_B, NPU, left(2 * peak)) is None
    warning = check_device(config, SIX_B, NPU, left(peak))
    assert warning is not None
    assert warning.startswith("the memory may not last: --tp 1 --pp 2 --micro-batch-size 1 needs ")
    with pytest.raises(ConfigError, match=r"--tp 1 --pp 2 .* of a device, more than") as caught:
        check_device(config, SIX_B, NPU, left(peak - 1))
    assert caught.value.hint.startswith("use --tp 1 --pp 2 --micro-batch-size 1 --recompute full")
    assert caught.value.hint.endswith("; --device-memory overrules what the device says")
    assert check_device(planned(pp=2, device_memory="1TB"), SIX_B, NPU, left(peak - 1)) is None


def test_the_device_that_is_planned_for_is_the_chips_or_the_one_here(monkeypatch):
    monkeypatch.setattr("glm3cli.device.find", lambda: "npu")
    assert saved_by_kernels(planned()) == NPU
    assert saved_by_kernels(planned(device="cpu")) == DEVICES["cpu"].saved_for_backward
    assert saved_by_kernels(planned(device="cpu", device_memory="64GB")) == NPU
    assert saved_by_kernels(planned(chip="A100")) == DEVICES["cuda"].saved_for_backward
    assert (
        saved_by_kernels(train_config(device="cpu", device_memory="64GB"))
        == DEVICES["cpu"].saved_for_backward
    )


def test_if_recomputing_does_not_help_another_plan_is_named():
    with pytest.raises(ConfigError) as caught:
        check_memory(planned(micro_batch_size=8, device_memory="32GB"), SIX_B)
    assert caught.value.hint.startswith("use --tp ")
    assert "--tp 1 --pp 1 --micro-batch-size 8" not in caught.value.hint


def test_if_nothing_helps_it_is_said():
    with pytest.raises(ConfigError) as caught:
        check_memory(planned(device_memory="2GB"), SIX_B)
    assert caught.value.hint.endswith("; use more devices, or shorter sequences")
    assert "GiB too much" in caught.value.hint


def test_a_plan_that_does_not_fit_says_so_first():
    first, *rest = advise(planned(pp=2, device_memory="48GB"), SIX_B).splitlines()
    assert first.startswith("does not fit: --tp 1 --pp 2")
    assert "; use --tp 1 --pp 2 --micro-batch-size 1 --recompute full" in first
    assert rest[0].startswith("layouts for 910B")


# --- --auto-layout ---


def test_the_chosen_plan_is_the_fastest_that_fits_whatever_sizes_were_given():
    given = {"auto_layout": True, "chip": "910B"}
    choice = choose(planned(**given), SIX_B)
    found = search(planned(), SIX_B, NPU, None, CARD)
    assert flags(choice.config) == flags(found.fitting[0].config)
    assert not choice.config.auto_layout
    assert choice.config.chip == "910B"
    assert choice.why.startswith(f"--auto-layout takes {flags(choice.config)}: of ")
    assert f"{len(found.fitting)} layouts that fit into 8 x 910B with 64.00 GiB" in choice.why
    assert f"; next is {flags(found.fitting[1].config)} with " in choice.why
    other = planned(**given, tp=2, pp=4, layers_per_stage="6,8,8,6", recompute="full")
    assert choose(other, SIX_B).config == choice.config


def test_a_plan_is_chosen_for_the_device_that_is_here_or_that_a_dry_run_names(monkeypatch):
    here = train_config(auto_layout=True, device="cpu", nproc=2)
    choice = choose(here, PRESETS["tiny"])
    assert "layouts that fit into 2 x CPU with " in choice.why
    assert choice.config.chip is None
    # The ranks choose what the process that starts them has chosen.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose(here, PRESETS["tiny"]) == choice
    # With a description of its own, a run keeps its kernels, and the description isn't kept.
    mine = here.model_copy(update={"chip": "A100"})
    choice = choose(mine, PRESETS["tiny"])
    assert "2 x A100 with 80.00 GiB" in choice.why
    assert choice.config.chip is None
    elsewhere = choose(planned(auto_layout=True, device="cpu", device_memory="32GB"), SIX_B)
    assert "8 x 910B with 29.80 GiB" in elsewhere.why
    assert elsewhere.config.chip == "910B"
    card = here.model_copy(update={"device": "npu"})
    assert "2 x 910B with 64.00 GiB" in choose(card, PRESETS["tiny"]).why


def test_if_no_plan_fits_there_is_none_to_choose():
    with pytest.raises(ConfigError, match=r"--auto-layout: none of .* layouts fits") as caught:
        choose(planned(auto_layout=True, device_memory="2GB"), SIX_B)
    assert caught.value.hint.startswith("use more devices, shorter sequences")


def test_a_gpu_is_planned_for_by_its_name_with_its_own_memory(monkeypatch):
    gpu = DEVICES["cuda"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, expected in {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A10": None, "Z": None}.items():
        about = SimpleNamespace(name=name, total_memory=79 * 2**30)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, about=about: about)
        if expected:
            assert gpu.described(8) == replace(find_chip(expected), memory_gib=79)
            continue
        with pytest.raises(DeviceError, match="--device cuda: the speed and the memory") as caught:
            gpu.described(8)
        assert "give --chip mine.toml" in caught.value.hint
