"""The memory of a training step on one rank, predicted from shapes; imports nothing heavy.

Weights, gradients, and optimizer state are exact. Activations are the tensors that autograd really
saves in our model, which plan/activations.py lists. tests/distributed/test_memory.py compares the
whole prediction with measured peaks.

The prediction leaves out the driver, buffers of the communication library, and the allocator's
fragmentation, for which `HEADROOM` stays free, and the mask that keeps packed samples apart on
devices whose kernels need one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm3cli.checkpoint.names import WEIGHTS, Stage, weights_of
from glm3cli.config.model import DTYPE_BYTES, ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.plan.activations import Sizes, bytes_of_scores, saved_by_layer
from glm3cli.plan.parameters import parameters_of_rank

if TYPE_CHECKING:
    from glm3cli.device.kernels import SavedForBackward

_EMBEDDING, _OUTPUT = (
    next(weight for weight in WEIGHTS if weight.logical == name) for name in ("embedding", "output")
)
# Share of a device's memory that a plan leaves free for what isn't counted.
HEADROOM = 0.1


@dataclass(frozen=True)
class StageMemory:
    """The memory of each rank of one pipeline stage, in bytes.

    Attributes:
        weights: The weights in the type that is trained in.
        gradients: The fp32 gradients of the trained weights.
        optimizer: The optimizer's moments, and the fp32 copies of 16-bit weights.
        buffers: The buffer that tensor parallel layers keep for inputs that they gather.
        activations: What is saved for the backward pass, of all micro-batches in flight.
        work: The most that a backward pass or the loss holds beside the other parts.
        step: What the optimizer step holds beside weights, gradients, and optimizer state.
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
        """The bytes that stay allocated from step to step."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def peak(self) -> int:
        """The most bytes at any time: when a backward pass begins, or in the optimizer step."""
        return self.persistent + max(self.activations + self.work, self.step)

    @property
    def at_peak(self) -> str:
        """The part of the step in which the peak is reached, in words."""
        return "optimizer step" if self.step > self.activations + self.work else "backward pass"


def memory_of_stage(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", pp_rank: int
) -> StageMemory:
    """Predicts the memory of each rank of a pipeline stage.

    Gradients are fp32. The optimizer holds two fp32 moments, and an fp32 copy of 16-bit weights;
    the distributed optimizer shares them out over the data and context parallel ranks. Weights
    that aren't trained have none of these.

    Args:
        config: The parallel sizes, the batch, and what is recomputed.
        model: The model's shape.
        kernels: What the device's kernels save for the backward pass.
        pp_rank: The stage's rank in the pipeline.
    """
    counts = parameters_of_rank(config, model, pp_rank)
    ranks = config.dp * config.cp if config.distributed_optimizer else 1
    owned = counts.trained // ranks
    # In fp32 the optimizer updates the weights themselves and has no second copy of them.
    copy = 0 if config.dtype == "fp32" else 4
    sizes = Sizes.of(config, model, kernels)
    return StageMemory(
        weights=counts.total * DTYPE_BYTES[config.dtype],
        gradients=counts.trained * 4,
        optimizer=owned * (8 + copy),
        # Frozen layers gather into memory of their own, which they free at once.
        buffers=0 if config.is_adapted else int(sizes.gathered),
        activations=int(
            _in_flight(config, pp_rank) * _saved_by_chunk(config, model, kernels, pp_rank)
        ),
        work=int(_work(config, model, kernels, pp_rank)),
        # AdamW's root of the second moment, of all weights at once (torch's foreach loops).
        step=4 * owned,
    )


def _layers_of_chunk(config: TrainConfig, model: ModelConfig, pp_rank: int) -> int:
    """Returns the number of layers of one chunk of a stage; all its chunks have as many."""
    return len(config.layers_of(model.num_layers, pp_rank))


def _layers_with_gradients(config: TrainConfig, model: ModelConfig, pp_rank: int) -> int:
    """Returns the number of layers of a chunk that save anything for a backward pass.

    Those of the first stage before the first trained weight don't; a stage that receives hidden
    states sends their gradients back through all layers.
    """
    layers = config.layers_of(model.num_layers, pp_rank)
    is_first = pp_rank == 0 and config.vpp == 1 and config.recompute != "full"
    if not is_first or config.is_adapted or config.trains(_EMBEDDING.name("chatglm")):
        return len(layers)
    of_layers = [weight for weight in weights_of(model) if weight.stage is Stage.LAYER]
    frozen = 0
    for layer in layers:
        if any(config.trains(weight.name("chatglm", layer)) for weight in of_layers):
            break
        frozen += 1
    return len(layers) - frozen


def _saved_by_chunk(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", pp_rank: int
) -> float:
    """Returns the bytes that one model chunk saves of one micro-batch."""
    sizes = Sizes.of(config, model, kernels)
    layers = _layers_with_gradients(config, model, pp_rank)
    layer = sum(saved_by_layer(config, model, kernels).values())
    saved = layers * layer
    if config.is_adapted and pp_rank == 0 and config.vpp == 1:
        saved -= sizes.norm  # the first norm is frozen, and so is what it reads
    if config.recompute == "full":
        group = min(config.recompute_num_layers, layers)
        if config.recompute_method == "block":
            saved = group * sizes.hidden + (layers - group) * layer
        else:
            saved = -(-layers // group) * sizes.hidden
    if config.pp > 1:
        # The tensor that was sent to the next stage (some devices hold it until it has gone), and
        # the one that was received, unless the first norm saves copies instead of it.
        # Of two copies in fp32, one is the received tensor itself.
        copied = kernels.norm_copies == 1 or (kernels.norm_copies > 0 and config.dtype != "fp32")
        saved += sizes.hidden * (2 if copied else 1)
    return saved


def _in_flight(config: TrainConfig, pp_rank: int) -> int:
    """Returns the most micro-batches, counted per chunk, between forward and backward pass.

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
    """Returns the most bytes that are held for a moment beside the saved activations."""
    layer = _work_of_layer(config, model, kernels, pp_rank)
    if kernels.scores:  # the softmax and its gradient, beside the scores that are saved
        layer = max(layer, 2 * bytes_of_scores(config, model))
    if pp_rank < config.pp - 1:
        return layer
    return max(layer, _work_of_loss(config, model, kernels))


def _work_of_layer(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", pp_rank: int
) -> float:
    """Returns the bytes that the backward pass of a stage's last layer takes.

    That layer's backward pass runs first, while the activations of all other layers are there.
    """
    sizes, layers = Sizes.of(config, model, kernels), _layers_of_chunk(config, model, pp_rank)
    ffn = sizes.tokens * model.ffn_hidden_size / config.tp * sizes.element
    # The gradients of the layer's output, of fc2's input (which is gone by then), and of fc1's
    # output in pieces.
    gradients = sizes.hidden + 3 * ffn
    if config.recompute != "full":
        return gradients
    group = min(config.recompute_num_layers, layers)
    if config.recompute_method == "block":
        # The recomputed layers are the stage's first; when their backward pass begins, the later
        # layers have freed their activations.
        group = 1 if group == layers else 0
    return gradients + group * sum(saved_by_layer(config, model, kernels).values())


def _work_of_loss(config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward") -> float:
    """Returns the bytes of the last norm, the logits, the loss, and their backward pass."""
    sizes = Sizes.of(config, model, kernels)
    vocab = model.padded_vocab_size / config.tp
    logits = sizes.tokens * vocab * sizes.element
    # Our loss makes log-probabilities of fp32 logits; megatron-core's, over tensor parallel ranks,
    # works in place of the logits. Both copy 16-bit logits to fp32 first.
    loss = sizes.tokens * vocab * 4 * ((config.tp == 1) + (config.dtype != "fp32")) + logits
    # Gradients of the output layer's weight and input; sequence parallelism scatters the latter.
    is_trained = config.trains(_OUTPUT.name("chatglm"))
    weight = vocab * model.hidden_size * sizes.element * is_trained
    backward = logits + weight + sizes.whole + (sizes.gathered + sizes.hidden) * (sizes.shards > 1)
    return sizes.norm + sizes.hidden + max(loss, backward)
