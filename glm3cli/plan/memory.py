"""Memory of a training step on one rank, from shapes alone; imports nothing heavy.

Weights, gradients, and optimizer state are exact. Activations are what autograd really keeps of
our model (plan/activations.py). tests/distributed/test_memory.py compares all of it with measured
peaks.

Not counted: the driver, buffers of the communication library, and the allocator's fragmentation
(`HEADROOM`), and the mask that keeps packed samples apart where no kernel does.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm3cli.config.model import DTYPE_BYTES, ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.plan.activations import Sizes, saved_by_layer

if TYPE_CHECKING:
    from glm3cli.device.kernels import SavedForBackward

# Share of a device's memory that a plan leaves free, for what isn't counted.
HEADROOM = 0.1


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage.

    Attributes:
        buffers: Kept by tensor parallel layers for gathered inputs.
        activations: Kept for the backward pass, of all micro-batches in flight.
        work: The most that a backward pass or the loss holds beside these.
        step: What the optimizer step holds beside weights, gradients, and its state.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    work: int
    step: int

    @property
    def persistent(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def peak(self) -> int:
        """The most at any time: when a backward pass begins, or in the optimizer step."""
        return self.persistent + max(self.activations + self.work, self.step)

    @property
    def at_peak(self) -> str:
        """What runs when the peak is reached."""
        return "optimizer step" if self.step > self.activations + self.work else "backward pass"


def parameters_of_rank(config: TrainConfig, model: ModelConfig, pp_rank: int) -> int:
    """Weights on one tensor parallel rank of stage `pp_rank`."""
    h, tp = model.hidden_size, config.tp
    rows = (model.query_size + 2 * model.kv_size) // tp
    layer = 2 * h + rows * (h + 1) + (model.query_size * h + 3 * model.ffn_hidden_size * h) // tp
    chunks = range(config.vpp)
    layers = sum(len(config.layers_of(model.num_layers, pp_rank, chunk)) for chunk in chunks)
    vocab = model.padded_vocab_size * h // tp
    first, last = pp_rank == 0, pp_rank == config.pp - 1
    return layers * layer + first * vocab + last * (vocab + h)


def memory_of_stage(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", pp_rank: int
) -> StageMemory:
    """What each rank of stage `pp_rank` holds at its peak, with kernels that keep what is told.

    Gradients are fp32. The optimizer holds two fp32 moments, and an fp32 copy of 16-bit weights;
    the distributed optimizer shares them out over the data and context parallel ranks.
    """
    count = parameters_of_rank(config, model, pp_rank)
    ranks = config.dp * config.cp if config.distributed_optimizer else 1
    owned = count // ranks
    # The distributed optimizer keeps fp32 weights in place: it has no second copy of them.
    copy = 0 if config.dtype == "fp32" else 4
    sizes = Sizes.of(config, model, kernels)
    return StageMemory(
        weights=count * DTYPE_BYTES[config.dtype],
        gradients=count * 4,
        optimizer=owned * (8 + copy),
        buffers=int(sizes.gathered),
        activations=int(
            _in_flight(config, pp_rank) * _saved_by_chunk(config, model, kernels, pp_rank)
        ),
        work=int(_work(config, model, kernels, pp_rank)),
        # AdamW's root of the second moment, of all weights at once (torch's foreach loops).
        step=4 * owned,
    )


def _layers_of_chunk(config: TrainConfig, model: ModelConfig, pp_rank: int) -> int:
    return len(config.layers_of(model.num_layers, pp_rank))


def _saved_by_chunk(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", pp_rank: int
) -> float:
    """Bytes kept of one micro-batch in one model chunk."""
    sizes = Sizes.of(config, model, kernels)
    layers = _layers_of_chunk(config, model, pp_rank)
    layer = sum(saved_by_layer(config, model, kernels).values())
    saved = layers * layer
    if config.recompute == "full":
        group = min(config.recompute_num_layers, layers)
        if config.recompute_method == "block":
            saved = group * sizes.hidden + (layers - group) * layer
        else:
            saved = -(-layers // group) * sizes.hidden
    if config.pp > 1:
        # What was sent (some devices must keep it until it has gone), and what was received, where
        # the first norm keeps copies of it instead.
        copied = kernels.norm_copies > 0 and config.dtype != "fp32"
        saved += sizes.hidden * (2 if copied else 1)
    return saved


def _in_flight(config: TrainConfig, pp_rank: int) -> int:
    """Most micro-batches, counted per chunk, between their forward and backward pass.

    1F1B's warm-up and one more (Narayanan et al. 2021, "Efficient large-scale language model
    training on GPU clusters"); megatron-core, schedules.py: get_pp_rank_microbatches.
    """
    after = config.pp - pp_rank - 1
    if config.vpp == 1:
        return min(after + 1, config.num_microbatches)
    warm_up = 2 * after + (config.vpp - 1) * config.pp
    return min(warm_up + 1, config.vpp * config.num_microbatches)


def _work(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", pp_rank: int
) -> float:
    """Most bytes held for a moment beside what is kept for the backward pass."""
    layer = _work_of_layer(config, model, kernels, pp_rank)
    if pp_rank < config.pp - 1:
        return layer
    return max(layer, _work_of_loss(config, model, kernels))


def _work_of_layer(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", pp_rank: int
) -> float:
    """The backward pass of a stage's last layer, which finds all others' activations there."""
    sizes, layers = Sizes.of(config, model, kernels), _layers_of_chunk(config, model, pp_rank)
    ffn = sizes.tokens * model.ffn_hidden_size / config.tp * sizes.element
    # Of the layer's output, of fc2's input (which is gone by then), and of fc1's output in pieces.
    gradients = sizes.hidden + 3 * ffn
    if config.recompute != "full":
        return gradients
    group = min(config.recompute_num_layers, layers)
    if config.recompute_method == "block":
        # The recomputed layers come first; when their turn is, the others have freed theirs.
        group = 1 if group == layers else 0
    return gradients + group * sum(saved_by_layer(config, model, kernels).values())


def _work_of_loss(config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward") -> float:
    """The last norm, the logits (fp32 for the loss), and their backward pass."""
    sizes = Sizes.of(config, model, kernels)
    vocab = model.padded_vocab_size / config.tp
    logits = sizes.tokens * vocab * sizes.element
    # Ours makes log-probabilities of fp32 logits; megatron-core's, over tensor parallel ranks,
    # works in place of these. Those of 16 bits are copied to fp32 first.
    loss = sizes.tokens * vocab * 4 * ((config.tp == 1) + (config.dtype != "fp32")) + logits
    # Gradients of the output layer's weight and input; sequence parallelism scatters the latter.
    weight = vocab * model.hidden_size * sizes.element
    backward = logits + weight + sizes.whole + (sizes.gathered + sizes.hidden) * (sizes.shards > 1)
    return sizes.norm + sizes.hidden + max(loss, backward)
