"""What a step of instructions minimises: means over tokens or samples, weights, noise, and sources.

The loss and the gradient norm of the first step are compared with those of transformers'
GlmForCausalLM on the same samples, one at a time. Tolerance: fp32 sums in another order, 1e-5 of
the loss and 1e-4 of the norm.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import RankPool
from tests.support.samples import write_documents
from tests.support.tiny import TINY
from tests.support.training import build, first_source

pytestmark = pytest.mark.dist

SIZES = [30, 6, 17, 8, 25, 12, 31, 7]
SOURCES = ("first", "second")
PARALLEL_SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp2": (2, {"tp": 2, "micro_batch_size": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2, "micro_batch_size": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2 left": (2, {"padding_side": "left", "micro_batch_size": 2}),
}
Conversation = tuple[list[int], list[int]]


def conversation(size: int, random: Any) -> Conversation:
    """A sample of two answers: token ids, and labels that leave out both questions."""
    tokens = random.integers(3, 128, size + 1).tolist()
    first, second = size // 3, size // 2
    hidden = [*range(2), *range(first, second)]
    return tokens, [-100 if i in hidden else token for i, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def samples() -> list[Conversation]:
    random = np.random.default_rng(8)
    return [conversation(size, random) for size in SIZES]


@pytest.fixture(scope="module")
def prefixes(samples: list[Conversation], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two data sets of half of the samples each."""
    folder, found = tmp_path_factory.mktemp("samples"), []
    for number, name in enumerate(SOURCES):
        part = samples[4 * number : 4 * number + 4]
        columns = {
            "input_ids": [ids for ids, _ in part],
            "labels": [labels for _, labels in part],
            "attention_mask": [[1] * len(ids) for ids, _ in part],
        }
        for key, sequences in columns.items():
            write_documents(folder / f"{name}_packed_{key}_document", sequences)
        found.append(str(folder / name))
    return found


def one_step(prefixes: list[str], options: dict[str, Any]) -> tuple[float, float, int, Any]:
    """Trains one step on all samples; returns loss, gradient norm, trained tokens, and means."""
    from glm3cli.data.prefixes import Blend
    from glm3cli.data.samples.instructions import build_instruction
    from glm3cli.data.samples.spec import DataSpec
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.objective import NextTokenLoss
    from tests.support.tiny import train_config
    from tests.support.tiny_tokenizer import tiny_tokenizer

    with open_grid(train_config(**options)) as grid:
        config, train_step, loader = build(options, grid)
        spec = DataSpec(Blend(tuple(prefixes), None), "1,0,0", config.seq_length, 1, len(SIZES), 0)
        dataset, _ = build_instruction(spec.with_instructions(config), tiny_tokenizer())
        step = replace(train_step, objective=NextTokenLoss.of(config, SOURCES))
        outcome = step.run(replace(loader, dataset=dataset, sources=tuple(prefixes)), 0)
        return outcome.loss, outcome.grad_norm, outcome.num_tokens, dict(outcome.means)


def references(samples: list[Conversation], weigh: Any) -> tuple[float, float, list[float]]:
    """The loss, the gradient norm, and the losses of both data sets, by transformers."""
    import torch

    from tests.support import reference as glm

    model = glm.build(TINY, first_source())
    sums, weights = torch.zeros(2), torch.zeros(2)
    for number, (ids, labels) in enumerate(samples):
        logits = model(torch.tensor([ids[:-1]])).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), reduction="none"
        )
        weight = weigh(torch.tensor(labels[1:]))
        sums = sums + torch.nn.functional.one_hot(torch.tensor(number // 4), 2) * (
            (losses * weight).sum()
        )
        weights[number // 4] += weight.sum()
    loss = sums.sum() / weights.sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return float(loss), float(norm), (sums / weights).tolist()


def by_token(labels: Any) -> Any:
    return (labels != -100).float()


def by_sample(labels: Any) -> Any:
    return by_token(labels) / by_token(labels).sum()


def by_last_turn(labels: Any) -> Any:
    weight = by_token(labels)
    last = int((labels == -100).nonzero().max())
    weight[: last + 1] = 0
    return weight


WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "token": ({}, by_token),
    "sample": ({"loss_average": "sample"}, by_sample),
    "last turn": ({"last_turn_only": True}, by_last_turn),
}
CASES = [("one rank", way) for way in WAYS] + [
    (sizes, "sample") for sizes in ("tp2", "pp2 vpp2", "cp2", "dp2 left")
]


@pytest.mark.parametrize(("sizes", "way"), CASES)
def test_losses_are_those_of_transformers(
    prefixes: list[str], samples: list[Conversation], ranks: RankPool, sizes: str, way: str
) -> None:
    options, weigh = WAYS[way]
    loss, norm, by_source = references(samples, weigh)
    world_size, layout = PARALLEL_SIZES[sizes]
    options = {"global_batch_size": len(SIZES), **options, **layout}
    for found, grad_norm, num_tokens, means in ranks.run(world_size, one_step, prefixes, options):
        assert found == pytest.approx(loss, rel=1e-5)
        assert grad_norm == pytest.approx(norm, rel=1e-4)
        assert list(means.values()) == pytest.approx(by_source, rel=1e-5)
        assert list(means) == ["loss by data/first", "loss by data/second"]
        trained = [label for _, labels in samples for label in labels[1:] if label != -100]
        if way != "last turn":
            assert num_tokens == len(trained)
        else:
            assert 0 < num_tokens < len(trained)


def test_a_mean_over_samples_trains_alike_in_packs(
    prefixes: list[str], samples: list[Conversation], ranks: RankPool
) -> None:
    loss, norm, _ = references(samples, by_sample)
    options = {"loss_average": "sample", "packing": True, "global_batch_size": 5}
    for found, grad_norm, _, _ in ranks.run(1, one_step, prefixes, options):
        assert found == pytest.approx(loss, rel=1e-5)
        assert grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.fixture(scope="module")
def with_noise(prefixes: list[str], ranks: RankPool) -> tuple[float, float]:
    options = {"neftune_alpha": 5.0, "global_batch_size": len(SIZES)}
    return ranks.run(1, one_step, prefixes, options)[0][:2]


def test_noise_changes_the_loss(
    prefixes: list[str], ranks: RankPool, with_noise: tuple[float, float]
) -> None:
    [(loss, *_)] = ranks.run(1, one_step, prefixes, {"global_batch_size": len(SIZES)})
    assert loss != pytest.approx(with_noise[0], rel=1e-4)
    assert loss == pytest.approx(with_noise[0], rel=0.1)


@pytest.mark.parametrize("sizes", ["tp2", "pp2 vpp2", "cp2", "dp2 left"])
def test_noise_is_the_same_at_all_parallel_sizes(
    prefixes: list[str], ranks: RankPool, with_noise: tuple[float, float], sizes: str
) -> None:
    world_size, layout = PARALLEL_SIZES[sizes]
    options = {"neftune_alpha": 5.0, "global_batch_size": len(SIZES), **layout}
    for loss, norm, _, _ in ranks.run(world_size, one_step, prefixes, options):
        assert loss == pytest.approx(with_noise[0], rel=1e-5)
        assert norm == pytest.approx(with_noise[1], rel=1e-4)
