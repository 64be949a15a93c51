"""Adapters train as peft trains them, at all parallel sizes, and are the same after a resume.

The tolerance of losses against peft is 2e-4: fp32 sums in another order, over five steps of AdamW
at a high learning rate; it comes to some 1e-6. Against our own run on one rank it is 1e-5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.support.ranks import RankPool
from tests.support.tiny import TINY, train_config
from tests.support.training import first_source
from tests.support.tuning import STEPS, Tuned, tune

pytestmark = pytest.mark.dist

PEFT, OURS = 2e-4, 1e-5  # relative
LORA = {"lora_rank": 4, "lora_alpha": 12.0}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"micro_batch_size": 4}),
    "tp2": (2, {"tp": 2, "micro_batch_size": 8}),
    "tp2 without sequence parallelism": (
        2,
        {"tp": 2, "sequence_parallel": False, "micro_batch_size": 8},
    ),
    "tp2 sending while it multiplies": (2, {"tp": 2, "mc2": True, "micro_batch_size": 8}),
    "tp4, more ranks than groups": (4, {"tp": 4, "micro_batch_size": 8}),
    "pp2": (2, {"pp": 2, "micro_batch_size": 4}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2, "micro_batch_size": 4}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2, "micro_batch_size": 4}),
    "dp2": (2, {"micro_batch_size": 4}),
    "dp2 overlapped": (
        2,
        {"overlap_grad_reduce": True, "overlap_param_gather": True, "micro_batch_size": 4},
    ),
    "dp2 replicated optimizer": (2, {"distributed_optimizer": False, "micro_batch_size": 4}),
    "cp2": (2, {"cp": 2, "micro_batch_size": 8}),
    "recompute full": (1, {"recompute": "full", "micro_batch_size": 4}),
    "recompute selective": (1, {"recompute": "selective", "micro_batch_size": 4}),
    "tp2 pp2 recompute full": (
        4,
        {"tp": 2, "pp": 2, "recompute": "full", "micro_batch_size": 4},
    ),
}


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool) -> Tuned:
    return ranks.run(1, tune, {**LORA, "micro_batch_size": 8})[0]


def in_peft(
    options: dict[str, Any], rates: Sequence[float], ratio: float = 1, **settings: Any
) -> list[float]:
    """The losses of peft's training from the same start."""
    from glm3cli.train.weights.adapter import first_adapter
    from tests.support.in_peft_training import losses_in_peft, with_peft

    config = train_config(**options)
    starts_itself = "init_lora_weights" in settings
    model = with_peft(
        TINY,
        first_source(),
        None if starts_itself else first_adapter(config, first_source()),
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        **settings,
    )
    return losses_in_peft(
        model,
        rates,
        seq_length=config.seq_length,
        batch=config.global_batch_size,
        vocab=TINY.padded_vocab_size,
        ratio=ratio,
    )


def check_alike(found: Sequence[Tuned], expected: Tuned) -> None:
    """Checks that ranks saw the losses, norms, and matrices of a run on one rank."""
    for rank in found:
        first = STEPS - len(rank.losses)
        assert rank.losses == pytest.approx(expected.losses[first:], rel=OURS)
        assert rank.grad_norms == pytest.approx(expected.grad_norms[first:], rel=1e-4)
        assert rank.without == pytest.approx(expected.without, rel=OURS)
    assert found[0].matrices is not None
    assert found[0].matrices.keys() == expected.matrices.keys()
    for name, matrix in expected.matrices.items():
        assert found[0].matrices[name] == pytest.approx(matrix, abs=1e-4), name


def test_the_losses_are_those_of_peft(one_rank: Tuned) -> None:
    expected = in_peft(LORA, one_rank.rates)
    assert one_rank.losses == pytest.approx(expected, rel=PEFT)
    untrained = in_peft(LORA, [0.0] * STEPS)
    assert one_rank.losses[-1] != pytest.approx(untrained[-1], rel=10 * PEFT)


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, ranks: RankPool) -> tuple[str, Tuned]:
    options = {**LORA, "lora_variant": request.param, "micro_batch_size": 8}
    return request.param, ranks.run(1, tune, options)[0]


def test_variants_have_the_losses_of_peft(variant: tuple[str, Tuned], one_rank: Tuned) -> None:
    name, found = variant
    options = {**LORA, "lora_variant": name}
    assert found.losses == pytest.approx(in_peft(options, found.rates, **VARIANTS[name]), rel=PEFT)
    assert found.losses != pytest.approx(one_rank.losses, rel=PEFT)
    # The base model is left as it was.
    assert found.without == pytest.approx(one_rank.without, rel=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        "tp2",
        "tp4, more ranks than groups",
        pytest.param("tp2 without sequence parallelism", marks=pytest.mark.slow),
        pytest.param("pp2", marks=pytest.mark.slow),
        pytest.param("tp2 pp2", marks=pytest.mark.slow),
        pytest.param("dp2", marks=pytest.mark.slow),
        pytest.param("cp2", marks=pytest.mark.slow),
        pytest.param("recompute full", marks=pytest.mark.slow),
        pytest.param("tp2 pp2 recompute full", marks=pytest.mark.slow),
    ],
)
def test_variants_train_alike(ranks: RankPool, variant: tuple[str, Tuned], sizes: str) -> None:
    name, expected = variant
    world_size, options = SIZES[sizes]
    check_alike(ranks.run(world_size, tune, {**LORA, "lora_variant": name, **options}), expected)


def test_variants_go_on_at_other_sizes(
    ranks: RankPool, variant: tuple[str, Tuned], tmp_path: Path
) -> None:
    name, expected = variant
    (size, before), (other, after) = SIZES["tp2"], SIZES["dp2"]
    settings = {**LORA, "lora_variant": name}
    ranks.run(size, tune, {**settings, **before}, 0, 2, tmp_path)
    check_alike(ranks.run(other, tune, {**settings, **after}, 2, STEPS, None, tmp_path), expected)


def test_lora_plus_has_the_losses_of_peft(ranks: RankPool, one_rank: Tuned) -> None:
    options = {**LORA, "lora_plus": 8.0, "lr": 2e-3}
    [found] = ranks.run(1, tune, {**options, "micro_batch_size": 8})
    assert found.losses == pytest.approx(in_peft(options, found.rates, ratio=8), rel=PEFT)
    plain = in_peft(options, found.rates)
    assert found.losses != pytest.approx(plain, rel=PEFT)


DROPOUT = {**LORA, "lora_dropout": 0.3}


@pytest.fixture(scope="module")
def dropping(ranks: RankPool) -> Tuned:
    return ranks.run(1, tune, {**DROPOUT, "micro_batch_size": 8})[0]


@pytest.mark.parametrize(
    "sizes",
    [
        "one rank",
        "tp2",
        "tp2 pp2 recompute full",
        "cp2",
        pytest.param("tp2 without sequence parallelism", marks=pytest.mark.slow),
        pytest.param("tp4, more ranks than groups", marks=pytest.mark.slow),
        pytest.param("pp2 vpp2", marks=pytest.mark.slow),
        pytest.param("dp2", marks=pytest.mark.slow),
        pytest.param("recompute selective", marks=pytest.mark.slow),
    ],
)
def test_dropout_is_the_same_everywhere(ranks: RankPool, dropping: Tuned, sizes: str) -> None:
    world_size, options = SIZES[sizes]
    check_alike(ranks.run(world_size, tune, {**DROPOUT, **options}), dropping)


def test_dropout_changes_the_training_alone(dropping: Tuned, one_rank: Tuned) -> None:
    assert dropping.losses[0] == pytest.approx(one_rank.losses[0], rel=1e-6)  # B is 0
    assert dropping.losses != pytest.approx(one_rank.losses, rel=PEFT)
    assert dropping.without == pytest.approx(one_rank.without, rel=1e-6)


def dropped(share: float) -> dict[str, float]:
    """Shares of elements of ones that dropout has kept, and how often two masks agree."""
    import torch

    from glm3cli.model.dropout import AdapterDropout
    from glm3cli.parallel.groups import open_grid

    with open_grid(train_config()):
        dropout = AdapterDropout(share, seed=3)
        ones = torch.ones(64, 2, 500)

        def mask(module: int, first: int = 0) -> torch.Tensor:
            dropout._current = torch.arange(first, first + 128).view(2, 64).T
            result = dropout._of_module(module, is_cut=False)(ones)
            assert result.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
            return result > 0

        def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
            return float((one == other).float().mean())

        first = mask(0)
        return {
            "kept": float(first.float().mean()),
            "again": agreement(first, mask(0)),
            "other module": agreement(first, mask(1)),
            "other tokens": agreement(first, mask(0, first=128)),
            "next position": agreement(first[1:], first[:-1]),
            "next element": agreement(first[..., 1:], first[..., :-1]),
            "module and position": agreement(first[1:], mask(1)[:-1]),
        }


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_draws_each_element_by_itself(ranks: RankPool, share: float) -> None:
    [found] = ranks.run(1, dropped, share)
    # 64,000 draws: five standard deviations are 1e-2.
    assert found.pop("kept") == pytest.approx(1 - share, abs=1e-2)
    assert found.pop("again") == 1
    for name, agreement in found.items():
        assert agreement == pytest.approx(share**2 + (1 - share) ** 2, abs=1e-2), name


def test_without_its_adapter_a_model_is_the_base_model(one_rank: Tuned) -> None:
    # B is 0 at first: the first loss is that of the base model.
    assert one_rank.without == pytest.approx(one_rank.losses[0], rel=1e-6)


def test_only_the_adapter_has_gradients(one_rank: Tuned) -> None:
    per_layer = (64 + 96) + (64 + 64) + (64 + 192) + (96 + 64)
    assert one_rank.trained == 4 * 4 * per_layer


@pytest.mark.parametrize("sizes", SIZES)
def test_all_parallel_sizes_train_alike(ranks: RankPool, one_rank: Tuned, sizes: str) -> None:
    world_size, options = SIZES[sizes]
    check_alike(ranks.run(world_size, tune, {**LORA, **options}), one_rank)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp2 pp2", "one rank"),
        ("dp2", "tp2"),
        ("pp2 vpp2", "dp2 replicated optimizer"),
        pytest.param("one rank", "tp4, more ranks than groups", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    ranks: RankPool, one_rank: Tuned, tmp_path: Path, before: str, after: str
) -> None:
    world_size, options = SIZES[before]
    ranks.run(world_size, tune, {**LORA, **options}, 0, 2, tmp_path)
    saved = FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    others = {name for name in saved if ".adapter." not in name and not name.startswith("rng/")}
    assert not others
    assert len(saved) - len(others) > 4 * 4 * 2 * 4  # modules, layers, matrices, parts of the state
    world_size, options = SIZES[after]
    check_alike(
        ranks.run(world_size, tune, {**LORA, **options}, 2, STEPS, None, tmp_path), one_rank
    )
