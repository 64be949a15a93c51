"""Loss and gradients of our model against transformers' GlmForCausalLM, at every parallel size.

Tolerance 1e-4 of a tensor's norm: both are fp32 and sum in different orders.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import RankPool
from tests.support.tiny import TINY, Samples, train_config

pytestmark = pytest.mark.dist
SIZES = {
    "tp1pp1": (1, {}),
    "tp2pp1": (2, {"tp": 2}),
    "tp1pp2": (2, {"pp": 2}),
    "tp2pp2": (4, {"tp": 2, "pp": 2}),
    "tp4pp1": (4, {"tp": 4}),
    "pp2vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {"distributed_optimizer": False}),
}
BATCH = {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 8}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, Path]:
    """The loss, and a file of the gradients."""
    import torch
    from safetensors.torch import save_file

    from glm3cli.checkpoint.random import RandomSource
    from tests.support import reference as glm

    model = glm.build(TINY, RandomSource(TINY, seed=7, std=0.05))
    samples = Samples(32, TINY.padded_vocab_size)
    batch = [samples[i] for i in range(8)]
    tokens, labels, mask = (
        torch.stack([torch.as_tensor(sample[key]) for sample in batch])
        for key in ("tokens", "labels", "loss_mask")
    )
    losses = torch.nn.functional.cross_entropy(
        model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    loss = (losses * mask.flatten()).sum() / mask.sum()
    loss.backward()
    path = tmp_path_factory.mktemp("reference") / "gradients.safetensors"
    save_file(glm.gradients(TINY, model), path)
    return float(loss.detach()), path


def _errors(options: dict[str, Any], path: Path) -> tuple[float, dict[str, float]]:
    """The loss, and the relative error of every gradient on this rank."""
    from glm3cli.parallel.groups import open_grid
    from tests.support.gradients import gradient_errors
    from tests.support.training import build

    with open_grid(train_config(**BATCH, **options)) as grid:
        config, train_step, loader = build({**BATCH, **options}, grid)
        totals = train_step.forward_backward(loader, 0)
        return totals.mean_loss, gradient_errors(train_step, config, path)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_equal_transformers(
    ranks: RankPool, reference: tuple[float, Path], sizes: str
) -> None:
    world_size, options = SIZES[sizes]
    for loss, errors in ranks.run(world_size, _errors, options, reference[1]):
        assert loss == pytest.approx(reference[0], rel=1e-6)
        wrong = {name: error for name, error in errors.items() if not error < 1e-4}
        assert errors
        assert not wrong
