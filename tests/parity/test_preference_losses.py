"""Losses, metrics and gradients of DPO, ORPO, SimPO and KTO against TRL's own code.

Tolerance 1e-4 of a loss and of a gradient's norm: both are fp32 and sum in different orders.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.preferences import Answer, LikedOrNot, PackedPairs, Pairs
from tests.support.ranks import RankPool
from tests.support.slow import mostly_slow
from tests.support.tiny import TINY, train_config

pytestmark = pytest.mark.dist
COUNT = 8  # samples of the global batch
SEQ_LENGTH = 32
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo"},
    "dpo, hinge": {"method": "dpo", "preference_loss": "hinge", "beta": 0.3},
    "dpo, ipo": {"method": "dpo", "preference_loss": "ipo", "beta": 0.2},
    "dpo, smoothed": {"method": "dpo", "label_smoothing": 0.2},
    "dpo, robust": {"method": "dpo", "preference_loss": "robust", "label_smoothing": 0.2},
    "dpo with sft": {"method": "dpo", "sft_weight": 0.7},
    "orpo": {"method": "orpo", "beta": 0.5},
    "simpo": {"method": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    "simpo, smoothed, with sft": {"method": "simpo", "label_smoothing": 0.1, "sft_weight": 0.5},
    "kto": {"method": "kto", "desirable_weight": 0.8, "undesirable_weight": 1.3},
}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {"micro_batch_size": 2}),
    "tp2": (2, {"tp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {"micro_batch_size": 2, "distributed_optimizer": False}),
    "cp2": (2, {"cp": 2, "distributed_optimizer": False}),
}


class Model:
    """A model as TRL patches it: it returns the log-probabilities of the labels, too."""

    def __init__(self, glm: Any) -> None:
        self._glm = glm
        self.training = True

    def __call__(self, input_ids: Any, attention_mask: Any, labels: Any = None, **_: Any) -> Any:
        logits = self._glm(input_ids=input_ids, attention_mask=attention_mask).logits
        if labels is None:
            return SimpleNamespace(logits=logits)
        following = labels[:, 1:]
        table = logits[:, :-1].log_softmax(-1)
        picked = table.gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        nothing = torch.zeros_like(following)
        return SimpleNamespace(
            log_probs=picked * (following != -100),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


def batch_of(answers: list[Answer]) -> dict[str, torch.Tensor]:
    """Token ids, attention mask and the mask of the answers, padded as TRL does it."""
    length = max(len(answer.ids) for answer in answers)
    ids, attention, trained = (torch.zeros(len(answers), length, dtype=torch.int64) for _ in "123")
    for i, answer in enumerate(answers):
        ids[i, : len(answer.ids)] = torch.tensor(answer.ids)
        attention[i, : len(answer.ids)] = 1
        trained[i, answer.start : len(answer.ids)] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": trained}


def trainer(kind: type, **attributes: Any) -> Any:
    """A trainer of TRL that was never set up, whose methods find what they read."""

    class Bare(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            self.accelerator = SimpleNamespace(
                device=torch.device("cpu"), gather=_same, gather_for_metrics=_same
            )
            self.model = SimpleNamespace(training=True)
            self.aux_loss_enabled = False
            self.is_encoder_decoder = False
            self._metrics: Any = {"train": Lists()}
            self._total_train_tokens, self._tp_size = 0, 1
            for name, value in attributes.items():
                setattr(self, name, value)

    return Bare()


class Lists(dict):
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


def _same(value: Any) -> Any:
    return value


def of_trl(options: dict[str, Any], model: Model) -> tuple[torch.Tensor, dict[str, float]]:
    """TRL's loss, and what it reports."""
    config = train_config(**options)
    if config.method == "kto":
        return of_kto(config, model)
    samples = Pairs(config.row_length, TINY.padded_vocab_size)
    pairs = [samples.answers(i) for i in range(COUNT)]
    chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return (of_dpo if config.method == "dpo" else of_cpo)(config, model, chosen, rejected)


def of_dpo(config: Any, model: Model, chosen: Any, rejected: Any) -> Any:
    from trl import DPOTrainer

    loss = config.preference_loss
    # Of a single pair its loss `aot` is cDPO, which it doesn't have by that name any more.
    alone = loss == "sigmoid" and config.label_smoothing
    types = ["aot" if alone else loss] + (["sft"] if config.sft_weight else [])
    bare = trainer(
        DPOTrainer,
        loss_types=types,
        loss_weights=[1.0, config.sft_weight][: len(types)],
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
    )
    parts = [[i] for i in range(len(chosen))] if alone else [range(len(chosen))]
    total = torch.zeros(())
    for part in parts:
        rows = [*(chosen[i] for i in part), *(rejected[i] for i in part)]
        inputs = batch_of(rows)
        for name, answers in (("chosen", chosen), ("rejected", rejected)):
            inputs[f"ref_{name}_logps"] = torch.tensor([answers[i].reference for i in part])
        total = total + bare._compute_loss(model, inputs, False) / len(parts)
    means = {name: sum(values) / len(values) for name, values in bare._metrics["train"].items()}
    return total, means


def of_cpo(config: Any, model: Model, chosen: Any, rejected: Any) -> Any:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    inputs = {}
    for name, answers in (("chosen", chosen), ("rejected", rejected)):
        found = batch_of(answers)
        trained = found.pop("completion_mask") == 1
        inputs |= {f"{name}_{key}": value for key, value in found.items()}
        inputs[f"{name}_labels"] = torch.where(trained, found["input_ids"], -100)
    bare = trainer(
        ORPOTrainer if config.method == "orpo" else CPOTrainer,
        beta=config.beta,
        padding_value=0,
        pad_token_id=0,
        loss_type="simpo",
        simpo_gamma=config.simpo_gamma,
        label_smoothing=config.label_smoothing,
        cpo_alpha=config.sft_weight,
        alpha=0.0,
    )
    return bare.get_batch_loss_metrics(model, inputs)


def of_kto(config: Any, model: Model) -> Any:
    from trl import KTOTrainer

    samples = LikedOrNot(config.row_length, TINY.padded_vocab_size)
    answers = [samples.answer(i) for i in range(COUNT)]
    others = [samples.other(i) for i in range(COUNT)]
    inputs = batch_of(answers)
    inputs |= {f"KL_{name}": value for name, value in batch_of(others).items()}
    inputs["label"] = torch.tensor([samples.is_liked(i) for i in range(COUNT)])
    inputs["ref_logps"] = torch.tensor([answer.reference for answer in answers])
    inputs["ref_KL_logps"] = torch.tensor([answer.reference for answer in others])
    bare = trainer(
        KTOTrainer,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    loss = bare._compute_loss(model, inputs, False)
    means = {name: sum(values) / len(values) for name, values in bare._metrics["train"].items()}
    return loss, means | {"kl/estimate": means["kl"]}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, Any, Path]]:
    """TRL's loss, means, and a file of gradients of each method."""
    from safetensors.torch import save_file

    from tests.support import reference as glm
    from tests.support.training import first_source

    folder, found = tmp_path_factory.mktemp("trl"), {}
    model = glm.build(TINY, first_source())
    for name, options in METHODS.items():
        model.zero_grad()
        loss, means = of_trl({"seq_length": SEQ_LENGTH, **options}, Model(model))
        loss.backward()
        file = folder / f"{name}.safetensors"
        save_file(glm.gradients(TINY, model), file)
        found[name] = float(loss.detach()), means, file
    return found


@contextmanager
def trained(options: dict[str, Any], methods: dict[str, Any], samples: Any) -> Iterator[Any]:
    """Yields, on a rank, a function that does the backward pass of a method."""
    from dataclasses import replace

    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.preferences.choose import choose_objective
    from tests.support.training import build

    base = {"seq_length": SEQ_LENGTH, "global_batch_size": COUNT, **options}
    first = next(iter(methods.values()))
    with open_grid(train_config(**base)) as grid:
        _, train_step, loader = build({**base, **first}, grid)

        def run(name: str) -> tuple[Any, Any, Any]:
            config = train_config(**base, **methods[name])
            dataset = samples(config.row_length, TINY.padded_vocab_size)
            step = replace(train_step, objective=choose_objective(config, grid))
            for chunk in step.chunks:
                chunk.config.finalize_model_grads_func = step.finalize
            length = config.row_length * (2 if samples is PackedPairs else 1)
            needs_all = config.needs_all_losses
            read = replace(loader, dataset=dataset, seq_length=length, needs_all=needs_all)
            return config, step, step.forward_backward(read, 0)

        yield run


def errors_here(
    options: dict[str, Any], methods: dict[str, Any], samples: Any, files: dict[str, Path]
) -> dict[str, Any]:
    """The loss, the means, and the errors of the gradients of each method; runs on the pool."""
    from tests.support.gradients import gradient_errors

    found = {}
    with trained(options, methods, samples) as run:
        for name in methods:
            config, step, totals = run(name)
            errors = gradient_errors(step, config, files[name])
            found[name] = totals.mean_loss, totals.means(), errors
    return found


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, (loss, means, errors) in found.items():
        of_trl, theirs, _ = expected[name]
        assert loss == pytest.approx(of_trl, rel=1e-4), name
        if METHODS[name]["method"] != "dpo" or "smoothed" not in name:
            shared = means.keys() & theirs.keys()
            assert {"rewards/chosen", "rewards/margins", "logps/rejected"} <= shared
            for mean in shared:
                assert means[mean] == pytest.approx(theirs[mean], rel=1e-4, abs=1e-5), (name, mean)
        wrong = {weight: error for weight, error in errors.items() if not error < 1e-4}
        assert errors, name
        assert not wrong, name


@pytest.mark.parametrize("sizes", mostly_slow(SIZES, ["tp1", "pp2 vpp2", "dp2"]))
def test_losses_and_gradients_equal_trls(
    ranks: RankPool, expected: dict[str, Any], sizes: str
) -> None:
    world_size, options = SIZES[sizes]
    files = {name: file for name, (_, _, file) in expected.items()}
    for samples in (Pairs, LikedOrNot):
        methods = {
            name: method
            for name, method in METHODS.items()
            if (method["method"] == "kto") == (samples is LikedOrNot)
        }
        for found in ranks.run(world_size, errors_here, options, methods, samples, files):
            check(found, expected)


def test_packed_pairs_train_as_single_ones(ranks: RankPool, expected: dict[str, Any]) -> None:
    methods = {name: METHODS[name] for name in ("dpo", "dpo with sft", "orpo")}
    files = {name: expected[name][2] for name in methods}
    options = {"cp": 2, "global_batch_size": COUNT // 2, "distributed_optimizer": False}
    for found in ranks.run(2, errors_here, options, methods, PackedPairs, files):
        check(found, expected)
