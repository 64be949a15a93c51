"""Training on the emulated NPU equals training on the CPU."""

from typing import Any

import pytest

from tests.support.ranks import RankPool
from tests.support.training import train_steps

pytestmark = pytest.mark.dist

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1 pp1": {},
    "tp2 pp1": {"tp": 2, "micro_batch_size": 4},
    "tp1 pp2": {"pp": 2, "micro_batch_size": 2},
}
STEPS = 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_20_steps_have_the_cpus_losses(ranks: RankPool, npu_ranks: RankPool, layout: str) -> None:
    """fp32; sums in another order differ by 1e-7 of their size a step."""
    options = LAYOUTS[layout]
    world_size = options.get("tp", 1) * options.get("pp", 1)
    [*_, expected] = ranks.run(world_size, train_steps, options, 0, STEPS)
    for found in npu_ranks.run(world_size, train_steps, options, 0, STEPS):
        assert [loss for loss, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)
        assert [norm for _, norm in found] == pytest.approx([x for _, x in expected], rel=1e-4)
