"""Every kind of member computes what transformers computes, at all parallel sizes.

Logits within 1e-4 of numbers around 5, and gradients within 1e-4 of a tensor's norm: both are fp32
and sum in different orders. An error of a position, a norm or a bias changes them by more than 0.1.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ParallelConfig
from tests.distributed.test_engine import random_source
from tests.support import reference
from tests.support.ranks import RankPool
from tests.support.tiny import TINY, Samples, train_config

pytestmark = pytest.mark.dist

SHAPE = TINY.model_copy(update={"num_query_groups": 4})
KINDS: dict[str, ModelConfig] = {
    name: SHAPE.model_copy(update=traits)
    for name, traits in {
        "chatglm2-6b-32k": {"rope_factor": 16.0},
        "glm-4-9b-chat": {"rope_ratio": 500.0, "layernorm_epsilon": 1.5625e-07},
        "GLM-4-9B-0414": {"sandwich_norms": True},
        "GLM-4-32B-0414": {"sandwich_norms": True, "add_qkv_bias": False},
    }.items()
}
SIZES: dict[str, tuple[int, dict[str, int]]] = {
    "tp1pp1": (1, {}),
    "tp2pp2": (4, {"tp": 2, "pp": 2}),
    "tp4pp1": (4, {"tp": 4}),
}
PROMPT, NEW = [7, 3, 99, 64, 65, 3, 3, 21], 12
BATCH = {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[int], torch.Tensor]]:
    """The greedy tokens of transformers for each kind, and the logits of the whole text."""
    found = {}
    for name, model in KINDS.items():
        native = reference.build(model, random_source(model)).eval()
        native.generation_config.eos_token_id = None
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            whole = native.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW,
                pad_token_id=0,
            )
            found[name] = whole[0, len(PROMPT) :].tolist(), native(whole).logits[0]
    return found


def answers(options: dict[str, int]) -> dict[str, tuple[list[int], torch.Tensor | None]]:
    """The same on a rank of the pool, whose logits are None before the last stage."""
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    parallel, found = ParallelConfig(**options), {}
    with open_grid(parallel) as grid:
        for name, model in KINDS.items():
            engine = Engine(random_source(model), parallel, "fp32", grid)
            [one] = engine.generate([PROMPT], Sampling(), NEW, stop_ids=[], seed=0)
            logits = engine.all_logits([[*PROMPT, *one.token_ids]])
            found[name] = one.token_ids, None if logits is None else logits[0]
    return found


@pytest.mark.parametrize("sizes", SIZES)
def test_logits_and_greedy_tokens(
    ranks: RankPool, expected: dict[str, tuple[list[int], torch.Tensor]], sizes: str
) -> None:
    world_size, options = SIZES[sizes]
    for found in ranks.run(world_size, answers, options):
        for name, (tokens, logits) in expected.items():
            assert found[name][0] == tokens, name
            if found[name][1] is not None:
                assert (found[name][1] - logits).abs().max() < 1e-4, name
    texts = [tokens for tokens, _ in expected.values()]
    assert len({tuple(one) for one in texts}) == len(texts)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, Path]]:
    """The loss in transformers for each kind, and a file of the gradients."""
    from tests.support.training import first_source

    found = {}
    for name, model in KINDS.items():
        native = reference.build(model, first_source(model))
        samples = Samples(32, model.padded_vocab_size)
        batch = [samples[i] for i in range(4)]
        tokens, labels, mask = (
            torch.stack([torch.as_tensor(sample[key]) for sample in batch])
            for key in ("tokens", "labels", "loss_mask")
        )
        losses = torch.nn.functional.cross_entropy(
            native(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none"
        )
        loss = (losses * mask.flatten()).sum() / mask.sum()
        loss.backward()
        path = tmp_path_factory.mktemp("members") / f"{name}.safetensors"
        save_file(reference.gradients(model, native), path)
        found[name] = float(loss.detach()), path
    return found


def errors(
    options: dict[str, int], files: dict[str, Path]
) -> dict[str, tuple[float, dict[str, float]]]:
    """The loss for each kind, and the relative error of every gradient on this rank."""
    from glm3cli.parallel.groups import open_grid
    from tests.support.gradients import gradient_errors
    from tests.support.training import build

    found: dict[str, Any] = {}
    with open_grid(train_config(**BATCH, **options)) as grid:
        for name, model in KINDS.items():
            config, train_step, loader = build({**BATCH, **options}, grid, model=model)
            totals = train_step.forward_backward(loader, 0)
            problems = gradient_errors(train_step, config, files[name], model)
            found[name] = totals.mean_loss, problems
    return found


@pytest.mark.parametrize("sizes", SIZES)
def test_losses_and_gradients(
    ranks: RankPool, gradients: dict[str, tuple[float, Path]], sizes: str
) -> None:
    world_size, options = SIZES[sizes]
    files = {name: path for name, (_, path) in gradients.items()}
    for found in ranks.run(world_size, errors, options, files):
        for name, (loss, problems) in found.items():
            assert loss == pytest.approx(gradients[name][0], rel=1e-6)
            assert problems
            assert {one: error for one, error in problems.items() if not error < 1e-4} == {}, name
