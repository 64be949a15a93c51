"""`forecast`: the predicted step of a run on devices that aren't here, and its tables as text.

Each stage's operators are recorded (`record`), timed one by one (`roofline`), and put into the
pipeline's schedule (`schedule`). plan/estimate.py predicts the same by formulas, which are made to
put hundreds of parallel plans in order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from glm3cli.config.model import DTYPE_BYTES, ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.device.catalog import Chip
from glm3cli.forecast.record import StageWork, record_stage
from glm3cli.forecast.recorder import Operator
from glm3cli.forecast.roofline import cost, send_seconds
from glm3cli.forecast.schedule import StagePace, span
from glm3cli.plan.parameters import frozen_of_model
from glm3cli.train.progress.flops import Utilisation

KINDS = ("matrix", "attention", "memory", "message")


@dataclass(frozen=True)
class StageTime:
    """The predicted times of one pipeline stage.

    Attributes:
        work: The operators of one rank of the stage.
        chip: The device that runs them.
        send: Seconds of one message to a neighbouring stage.
        reduces_early: Whether gradients are reduced while the backward pass runs.
    """

    work: StageWork
    chip: Chip
    send: float
    reduces_early: bool

    @cached_property
    def pace(self) -> StagePace:
        """The seconds of a micro-batch in each chunk of the stage, forward and backward."""
        forward = [_seconds(chunk.forward, self.chip) for chunk in self.work.chunks]
        backward = [_seconds(chunk.backward, self.chip) for chunk in self.work.chunks]
        return StagePace(forward, backward, self.send)

    @property
    def microbatch(self) -> list[Operator]:
        """The operators of a micro-batch, all chunks together."""
        return [one for chunk in self.work.chunks for one in (*chunk.forward, *chunk.backward)]

    def of_kind(self, kind: str) -> float:
        """Returns the seconds of a micro-batch in operators of a kind (see `OperatorKind`)."""
        return _seconds((one for one in self.microbatch if one.kind == kind), self.chip)

    @cached_property
    def update(self) -> float:
        """The seconds of the work that is done once per step.

        Messages that run during the passes count only as far as they take longer than these.
        """
        reductions = [
            one for one in self.work.update if one.kind == "message" and "reduce" in one.name
        ]
        total = _seconds(self.work.update, self.chip)
        if self.reduces_early:
            total -= min(_seconds(reductions, self.chip), sum(self.pace.backward))
        weights = _seconds(self.work.weights, self.chip)
        return total + max(0.0, weights - sum(self.pace.forward))


@dataclass(frozen=True)
class Line:
    """All calls of one operator in a step of one rank; a line of the table.

    Attributes:
        name: The operator's name as torch has it, such as aten.mm.
        calls: Number of calls.
        flops: Floating-point operations of all calls.
        bytes: Bytes that all calls read and write, or send.
        seconds: Seconds of all calls.
        bound: What bounds most of these seconds (see `Cost`).
    """

    name: str
    calls: int
    flops: float
    bytes: int
    seconds: float
    bound: str


@dataclass(frozen=True)
class Forecast:
    """A predicted optimizer step.

    Attributes:
        config: The run's settings.
        model: The model's shape.
        chip: The device that runs it.
        stages: The times of the pipeline's stages, in their order.
    """

    config: TrainConfig
    model: ModelConfig
    chip: Chip
    stages: Sequence[StageTime]

    @cached_property
    def pipeline(self) -> float:
        """The seconds in which the pipeline runs all micro-batches."""
        return span([stage.pace for stage in self.stages], self.config.num_microbatches)

    @property
    def seconds(self) -> float:
        """The seconds of the whole step."""
        return self.pipeline + max(stage.update for stage in self.stages)

    @property
    def busiest(self) -> StageTime:
        """The stage with the longest work per micro-batch, which the others wait for."""
        return max(self.stages, key=lambda stage: _busy(stage.pace))

    @property
    def bubble(self) -> float:
        """The share of the pipeline's time in which its busiest stage waits."""
        return 1 - self.config.num_microbatches * _busy(self.busiest.pace) / self.pipeline

    @property
    def tokens_per_second(self) -> float:
        """The tokens per second and device."""
        tokens = self.config.global_batch_size * self.config.row_length
        return tokens / self.seconds / self.config.world_size

    def utilisation(self) -> dict[str, float | None]:
        """Returns TFLOP/s and MFU under the names by which a run reports them."""
        peak = self.chip.peak_tflops
        frozen = frozen_of_model(self.config, self.model)
        rate = Utilisation(self.model, self.config.seq_length, peak, self.chip.name, frozen)
        return rate.of_rate(self.tokens_per_second)

    def lines(self) -> list[Line]:
        """Returns the operators of one step of the busiest stage, those with most seconds first."""
        stage, times = self.busiest, self.config.num_microbatches
        runs = [(one, times) for one in stage.microbatch] + [(one, 1) for one in stage.work.update]
        names: dict[str, list[tuple[Operator, int]]] = {}
        for one, count in runs:
            names.setdefault(one.name, []).append((one, count))
        lines = [_line(name, calls, self.chip) for name, calls in names.items()]
        return sorted(lines, key=lambda line: line.seconds, reverse=True)


def forecast(config: TrainConfig, model: ModelConfig, chip: Chip) -> Forecast:
    """Predicts the step of a run.

    The CPU must be the active device. Stages that hold alike parts are recorded once.

    Args:
        config: The run's settings.
        model: The model's shape.
        chip: The device to predict for.
    """
    found: dict[tuple[bool, bool, int], StageWork] = {}
    stages = []
    for rank in range(config.pp):
        layers = len(config.layers_of(model.num_layers, rank))
        alike = rank == 0, rank == config.pp - 1, layers
        if alike not in found:
            found[alike] = record_stage(config, model, chip.kind, rank)
        send = _send_seconds(config, model, chip)
        stages.append(StageTime(found[alike], chip, send, config.overlap_grad_reduce))
    return Forecast(config, model, chip, stages)


def _send_seconds(config: TrainConfig, model: ModelConfig, chip: Chip) -> float:
    """Returns the seconds of one message from a stage to the next; 0 with one stage."""
    if config.pp == 1:
        return 0.0
    tokens = config.micro_batch_size * config.row_length / config.cp
    shards = config.tp if config.sequence_parallel else 1
    size = tokens / shards * model.hidden_size * DTYPE_BYTES[config.dtype]
    return send_seconds(size, 2, config.world_size // config.pp + 1, chip)


def _seconds(operators: Iterable[Operator], chip: Chip) -> float:
    """Returns the seconds of operators that run one after the other."""
    return sum(cost(one, chip).seconds for one in operators)


def _busy(pace: StagePace) -> float:
    """Returns the seconds of a micro-batch in which a stage works or sends."""
    sends = 2 * pace.send if len(pace.forward) == 1 else 0.0
    return sum(pace.forward) + sum(pace.backward) + sends


def _line(name: str, calls: list[tuple[Operator, int]], chip: Chip) -> Line:
    """Sums up the calls of one operator, each with the number of times that it happens."""
    by_bound: dict[str, float] = {}
    for one, count in calls:
        each = cost(one, chip)
        by_bound[each.bound] = by_bound.get(each.bound, 0.0) + count * each.seconds
    return Line(
        name,
        calls=sum(count for _, count in calls),
        flops=sum(count * one.flops for one, count in calls),
        bytes=sum(count * one.bytes for one, count in calls),
        seconds=sum(by_bound.values()),
        bound=max(by_bound, key=lambda bound: by_bound[bound]),
    )


# --- as text ---

_ROWS = 8
_HEADS = {"matrix": "matrices", "attention": "attention", "memory": "others", "message": "messages"}


def describe(found: Forecast) -> str:
    """Returns a forecast as text: the step, its stages, and the operators that take most time."""
    rates = found.utilisation()
    lines = [
        f"step on {found.chip.name}, predicted from its operators: {found.seconds:.2f} s, bubble "
        f"{found.bubble:.1%}, {found.tokens_per_second:,.0f} tokens/s/device, MFU "
        f"{rates['mfu']:.1%} (causal {rates['mfu_causal']:.1%})",
        "ms per micro-batch: "
        + "".join(f"{head:>11}" for head in _HEADS.values())
        + "       send   per step",
    ]
    for rank, stage in enumerate(found.stages):
        parts = [stage.of_kind(kind) for kind in _HEADS] + [2 * stage.send, stage.update]
        lines.append(f"stage {rank:<13}" + "".join(f"{1e3 * part:11.1f}" for part in parts))
    lines.append(f"{'operators of the busiest stage':44}  calls   TFLOP      GB  seconds  bound by")
    lines += [
        f"{line.name:44} {line.calls:6,} {line.flops / 1e12:7,.0f} {line.bytes / 1e9:7,.0f} "
        f"{line.seconds:8.3f}  {line.bound}"
        for line in found.lines()[:_ROWS]
    ]
    return "\n".join(lines)
