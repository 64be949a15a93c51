"""A small model on the device beside `PlainModel`: training, a checkpoint, and new tokens."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glm3cli.checkpoint.load import load_weights, with_pieces
from glm3cli.checkpoint.random import RandomSource
from glm3cli.checkpoint.run.resume import gather_weights, load_training, save_request
from glm3cli.config.model import DType, ModelConfig
from glm3cli.config.training import PretrainConfig, TrainConfig
from glm3cli.data.samples.loader import Batch, Loader
from glm3cli.device import require_active
from glm3cli.device.dtypes import TORCH_DTYPES
from glm3cli.infer.engine import Engine
from glm3cli.infer.model import GREEDY
from glm3cli.model.build import unwrap
from glm3cli.numerics.outcome import ROUNDING, Outcome
from glm3cli.numerics.plain_model import PlainModel
from glm3cli.parallel.groups import Grid, open_grid
from glm3cli.parallel.storage import tell
from glm3cli.train.objective import run_batch
from glm3cli.train.setup import build_train_step, make_loader
from glm3cli.train.step import TrainStep

# Heads as wide as those of the 6B, by which fused attention is chosen; groups for tp 1 to 8.
SHAPE = ModelConfig(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=192,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=128,
    padded_vocab_size=512,
    seq_length=128,
    torch_dtype="fp32",
)
_STEPS = 3
_LENGTH = 48
_NEW_TOKENS = 8
_PROMPTS = ([7, 301, 44, 9, 250, 3, 77], [5])
_SEED = 5
# Sums in another order, through all layers and steps. A wrong operator, or a reduction that is
# missing, is off by more than 1e-2.
_SUMS = 1e-5
_OF_NORMS = 1e-4
_OF_WEIGHTS = 2e-4
_WHY_SUMS = "fp32 sums in another order"


@dataclass(frozen=True)
class Sizes:
    """How the ranks share the small model.

    Attributes:
        tp: The tensor parallel size.
        pp: The pipeline parallel size.
    """

    tp: int = 1
    pp: int = 1

    def __str__(self) -> str:
        return f"tp {self.tp}, pp {self.pp}"


def sizes_for(world_size: int) -> list[Sizes]:
    """Returns the ways in which so many ranks train the small model: each axis by itself."""
    tp = max(size for size in (1, 2, 4, 8) if world_size % size == 0)
    found = [Sizes(), Sizes(tp=tp), Sizes(pp=2 if world_size % 2 == 0 else 1)]
    return list(dict.fromkeys(found))


def check_small_model(sizes: Sizes, world_size: int, folder: Path) -> Iterator[Outcome]:
    """Trains, saves, reads and generates in process groups of its own; all ranks must call it.

    Args:
        sizes: How the ranks share the model.
        world_size: The number of ranks.
        folder: An empty folder that all ranks of this machine see, for a checkpoint.
    """
    for dtype in TORCH_DTYPES:
        config = _config(dtype, sizes, world_size)
        with open_grid(config) as grid:
            yield from _trained(config, grid, folder if dtype == "fp32" else None, str(sizes))
        with open_grid(config) as grid:
            yield from _generated(config, grid, dtype, str(sizes))


def speck(model: ModelConfig, grid: Grid) -> Callable[[], None]:
    """Returns what runs one micro-batch of a model forward and backward, without an optimizer.

    Args:
        model: The shape of the model.
        grid: This rank's place among the parallel groups; nothing is sent.
    """
    config = _config("fp32", Sizes(), grid.world_size)
    train_step = build_train_step(config, model, grid)
    for one in _parameters(train_step):
        torch.nn.init.normal_(one, std=0.02)
    tokens = torch.arange(model.seq_length, device=require_active().torch_device()).unsqueeze(0)
    batch = Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32))

    def run() -> None:
        run_batch(train_step.chunks[0], batch).sum().backward()  # type: ignore[no-untyped-call]

    return run


def _config(dtype: DType, sizes: Sizes, world_size: int) -> TrainConfig:
    """Returns the settings of the training."""
    return PretrainConfig.parse(
        {
            "from_scratch": True,
            "shape": "tiny",  # the real shape is given where the model is built
            "data": ["made up"],
            "save": Path("nowhere"),
            "train_iters": 1000,
            "lr": 1e-2,
            "lr_decay_style": "constant",
            "adam_eps": 1e-4,  # gradients around 0 would otherwise move a weight by their sign
            "seq_length": _LENGTH,
            "micro_batch_size": 1,
            "global_batch_size": 2 * world_size,
            "initial_loss_scale": 1024.0,
            "dtype": dtype,
            "tp": sizes.tp,
            "pp": sizes.pp,
        }
    )


class _Samples:
    """Random samples of which some tokens aren't trained."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(index)
        tokens = random.integers(0, SHAPE.padded_vocab_size, _LENGTH + 1)
        mask = (random.random(_LENGTH) < 0.8).astype(np.float32)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask}


def _source() -> RandomSource:
    return RandomSource(SHAPE, seed=_SEED, std=0.08)


def _trained(config: TrainConfig, grid: Grid, folder: Path | None, place: str) -> Iterator[Outcome]:
    """Yields how far some steps are from those of the plain model, and what a checkpoint keeps.

    Args:
        config: The settings of the training.
        grid: This rank's place among the parallel groups.
        folder: The folder for a checkpoint; None leaves it out.
        place: What the report says about the parallel sizes.
    """
    train_step = build_train_step(config, SHAPE, grid)
    load_weights([unwrap(chunk) for chunk in train_step.chunks], _source(), config, grid)
    train_step.optimizer.reload_model_params()
    loader = make_loader(config, SHAPE, grid, _Samples())
    model = PlainModel.of(_source())
    rounding = ROUNDING[TORCH_DTYPES[config.dtype]]
    whole = config.dtype == "fp32"
    for step in range(_STEPS if whole else 1):
        found = train_step.run(loader, step * config.global_batch_size)
        right = model.train(config, *_batch(config, step))
        pairs = {"loss": (found.loss, right.loss), "norm": (found.grad_norm, right.grad_norm)}
        limits = {
            "loss": _SUMS if whole else rounding,
            "norm": _OF_NORMS if whole else 8 * rounding,
        }
        for name, (ours, plain) in pairs.items():
            why = _WHY_SUMS if whole else f"roundings to {config.dtype}"
            yield Outcome(
                f"training: {'loss' if name == 'loss' else 'gradient norm'}",
                config.dtype,
                _relative(ours, plain),
                limits[name],
                why,
                f"{place}, step {step + 1}",
            )
    if whole:
        gather_weights(train_step.chunks)
        yield _weights_after(train_step, model, config, grid, place)
    if folder is not None:
        yield from _saved(train_step, loader, config, grid, folder, place)


def _batch(config: TrainConfig, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the whole global batch of a step as the plain model takes it."""
    first = step * config.global_batch_size
    samples = [_Samples()[index] for index in range(first, first + config.global_batch_size)]
    tokens, labels, mask = (
        torch.from_numpy(np.stack([sample[name] for sample in samples]))
        for name in ("tokens", "labels", "loss_mask")
    )
    return tokens, labels, mask.double()


def _relative(ours: float, plain: float) -> float:
    return abs(ours - plain) / abs(plain)


def _weights_after(
    train_step: TrainStep, model: PlainModel, config: TrainConfig, grid: Grid, place: str
) -> Outcome:
    """Compares this rank's weights, each by the norm of what training has changed of it."""
    gpts = [unwrap(chunk) for chunk in train_step.chunks]
    error = 0.0
    pairs = zip(
        with_pieces(gpts, model, config, grid),
        with_pieces(gpts, _source(), config, grid),
        strict=True,
    )
    for (ours, right), (_, before) in pairs:
        changed = (right - before.double()).norm().clamp(min=1e-30)
        each = float((ours.detach().to("cpu").double() - right).norm() / changed)
        error = max(error, each if each == each else torch.inf)
    return Outcome(
        "training: weights", config.dtype, error, _OF_WEIGHTS, _WHY_SUMS, f"{place}, {_STEPS} steps"
    )


def _saved(
    train_step: TrainStep,
    loader: Loader,
    config: TrainConfig,
    grid: Grid,
    folder: Path,
    place: str,
) -> Iterator[Outcome]:
    """Saves, trains on, restores as a new process does, and trains the same steps again."""
    parts = (train_step.chunks, train_step.optimizer, train_step.scheduler)
    consumed = _STEPS * config.global_batch_size
    target = folder / f"tp{grid.tp_size}pp{grid.pp_size}"
    target.mkdir(exist_ok=True)
    tell(None, 0)  # it is there for all ranks
    save_request(target, *parts, {"iteration": _STEPS}, grid).execute_sync()
    kept = [one.detach().clone() for one in _parameters(train_step)]
    first = _two_steps(train_step, loader, consumed)
    restored = build_train_step(config, SHAPE, grid)
    parts = (restored.chunks, restored.optimizer, restored.scheduler)
    progress, _ = load_training(target, *parts, grid)
    pairs = zip(_parameters(restored), kept, strict=True)
    wrong = sum(not torch.equal(one, before) for one, before in pairs)
    wrong += progress != {"iteration": _STEPS}
    yield Outcome(
        "checkpoint: weights", "fp32", float(wrong), 0.0, "what is read is what was saved", place
    )
    again = _two_steps(restored, loader, consumed)
    error = max(map(_relative, again, first))
    # Not 0: some chips add the gradients of an embedding in any order.
    yield Outcome("checkpoint: the next steps", "fp32", error, _SUMS, _WHY_SUMS, place)
    shutil.rmtree(target, ignore_errors=True)


def _two_steps(train_step: TrainStep, loader: Loader, consumed: int) -> list[float]:
    """Trains two steps, and returns the losses and gradient norms; the second shows the moments."""
    places = (consumed, consumed + loader.global_batch_size)
    found = [train_step.run(loader, place) for place in places]
    return [number for one in found for number in (one.loss, one.grad_norm)]


def _parameters(train_step: TrainStep) -> list[Any]:
    return [one for chunk in train_step.chunks for one in chunk.parameters()]


def _generated(config: TrainConfig, grid: Grid, dtype: DType, place: str) -> Iterator[Outcome]:
    """Yields how far greedy tokens and their log-probabilities are from the plain model's.

    The plain model scores the device's own tokens. The likeliest may be another where two are
    nearly as likely; then no more may lie between them than the two models differ by.
    """
    engine = Engine(_source(), config, dtype, grid)
    model = PlainModel.of(_source())
    limit, why = _SUMS, _WHY_SUMS
    if dtype != "fp32":
        limit, why = 16 * ROUNDING[TORCH_DTYPES[dtype]], f"16 roundings to {dtype}"
    found = engine.generate(_PROMPTS, GREEDY, _NEW_TOKENS, ())
    for prompt, generation in zip(_PROMPTS, found, strict=True):
        own, likeliest = model.logprobs(prompt, generation.token_ids)
        errors = [abs(a - b) for a, b in zip(generation.logprobs, own, strict=True)]
        gaps = [(best - one) / 2 for one, best in zip(own, likeliest, strict=True)]
        complete = len(generation.token_ids) == _NEW_TOKENS
        error = max([*errors, *gaps]) if complete else torch.inf
        yield Outcome(
            "generation: log-probabilities", dtype, error, limit, why,
            f"{place}, a prompt of {len(prompt)} tokens",
        )  # fmt: skip
