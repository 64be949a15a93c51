"""The predicted memory of an NPU is what its operators return and autograd saves.

It is measured on meta tensors: the real model, loss and optimizer of one micro-batch call the real
names of the operators at 8,192 tokens, and every storage is followed. The prediction leaves out a
few small tensors and, with tensor parallelism, which pieces of a gradient exist at the same time,
hence the tolerance of 1 %. The smallest tensor of a layer's table is 0.4 % and its norms are 12 %.
"""

from typing import Any

import pytest

from glm3cli.config.presets import PRESETS
from glm3cli.device import DEVICES
from glm3cli.device.choice import saved_without
from glm3cli.device.kernels import Kernels
from glm3cli.forecast.record import record_stage
from glm3cli.plan.activations import saved_by_layer
from glm3cli.plan.memory import memory_of_stage
from tests.support.live_memory import LiveMemory
from tests.support.tiny import train_config

# Two of its layers: the rest is more of the same.
SIX_B = PRESETS["6b"].model_copy(update={"num_layers": 2})
BLOCK = {"recompute": "full", "recompute_method": "block"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "fp32": {"dtype": "fp32"},
    "micro-batch 2": {"micro_batch_size": 2, "global_batch_size": 2},
    "recompute full": {"recompute": "full"},
    "recompute block": BLOCK,
    "recompute selective": {"recompute": "selective"},
    "tp2": {"tp": 2},
    "tp2 without sequence parallelism": {"tp": 2, "sequence_parallel": False},
    "tp4, more ranks than groups": {"tp": 4},
    "cp2": {"cp": 2},
    "pp2": {"pp": 2},
    "without the norm's kernel": {"without_kernel": ["rms-norm"]},
    "without attention's kernel": {"without_kernel": ["attention"]},
}
# Without its kernel, attention's work is counted beside what the layer's MLP has freed by then.
TOLERANCES = {"without attention's kernel": 0.05}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no torchrun had started this process."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("device", ["npu", "cpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_has_what_the_operators_save(layout: str, device: str) -> None:
    options = {"seq_length": 8192, "dtype": "bf16", "global_batch_size": 1, **LAYOUTS[layout]}
    size = options.get("tp", 1) * options.get("pp", 1) * options.get("cp", 1)
    config = train_config(dry_run=True, planned_world_size=size, **options)
    last = config.pp - 1
    with LiveMemory("meta") as memory:
        record_stage(config, SIX_B, device, last)
    saved = saved_without(DEVICES[device].saved_for_backward, config.without_kernel)
    told = memory_of_stage(config, SIX_B, saved, last)
    # Not `step`: AdamW is fused there, and holds nothing beside its state.
    told_peak = told.persistent + told.activations + told.work
    assert told_peak == pytest.approx(memory.peak, rel=TOLERANCES.get(layout, 0.01))


def test_an_npu_saves_a_third_less_than_plain_torch() -> None:
    config = train_config(seq_length=8192, dtype="bf16")
    npu, plain = (
        saved_by_layer(config, SIX_B, kernels)
        for kernels in (DEVICES["npu"].saved_for_backward, Kernels.saved_for_backward)
    )
    assert npu["norms"] == pytest.approx(plain["norms"] / 4, rel=0.01)
    assert sum(npu.values()) == pytest.approx(0.7 * sum(plain.values()), rel=0.02)
