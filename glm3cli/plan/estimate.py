"""A simple formula for the step time, to compare parallel plans quickly; imports nothing heavy.

It counts matrix products at one fixed share of the peak, weights and their gradients at the
memory's bandwidth, the pipeline's bubble, and messages at the bandwidth of their links. Messages
are not hidden behind operations unless an option overlaps them. It leaves out latencies, small
kernels, and the messages of the embedding and the loss: it is made to put hundreds of parallel
plans in order, not to predict the time itself. The room forecast/ predicts one plan from the
operators that it really runs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm3cli.config.model import DTYPE_BYTES, ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.plan.parameters import parameters_of_rank

if TYPE_CHECKING:
    from glm3cli.device.catalog import Chip

# Share of the 16-bit peak that a stage reaches while it works. It is fitted: with it a step of
# ChatGLM3-6B (8 devices, tp 1, pp 2, 8,192 tokens) is as fast as ModelLink's 4,611 tokens/s per
# device on 910B.
EFFICIENCY = 0.61
# Bytes that AdamW reads and writes per weight: gradient, two moments and fp32 weight there and
# back, and the root of the second moment.
_ADAM_BYTES = 4 + 2 * 12 + 8


@dataclass(frozen=True)
class StepTime:
    """The predicted time of an optimizer step.

    Attributes:
        seconds: Time of the whole step, in seconds.
        bubble: Share of the pipeline's time in which a stage waits for other stages.
        tokens_per_second: Tokens per second and device.
    """

    seconds: float
    bubble: float
    tokens_per_second: float


def predict(config: TrainConfig, model: ModelConfig, chip: "Chip") -> StepTime:
    """Predicts the step time of a parallel plan.

    Operations and messages are counted as if all weights were trained.

    Args:
        config: The parallel sizes, the batch, and what is recomputed.
        model: The model's shape.
        chip: The device that runs it.
    """
    stage = max(
        _operations(config, model, pp_rank) / (chip.peak_tflops * 1e12 * EFFICIENCY)
        + _weights(config, model, pp_rank) / chip.memory_bandwidth
        + _messages(config, model, chip, pp_rank)
        for pp_rank in range(config.pp)
    )
    # Narayanan et al. 2021: the interleaved schedule fills and drains in chunks.
    fill = (config.pp - 1) / config.vpp
    slots = config.num_microbatches + fill
    seconds = slots * stage + _update(config, model, chip)
    tokens = config.global_batch_size * config.row_length
    return StepTime(seconds, fill / slots, tokens / seconds / config.world_size)


def recomputed_share(config: TrainConfig, layers: int) -> float:
    """Returns the share of a chunk's layers whose forward pass runs twice.

    Args:
        config: What is recomputed.
        layers: Number of layers of the chunk.
    """
    if config.recompute != "full":
        return 0.0
    if config.recompute_method == "uniform":
        return 1.0
    return min(config.recompute_num_layers, layers) / layers


def _layers(config: TrainConfig, model: ModelConfig, pp_rank: int) -> int:
    """Returns the number of layers of a stage, all chunks together."""
    return len(config.layers_of(model.num_layers, pp_rank)) * config.vpp


def _share(config: TrainConfig, model: ModelConfig, pp_rank: int) -> float:
    """Returns the share of a stage's layers whose forward pass runs twice."""
    return recomputed_share(config, len(config.layers_of(model.num_layers, pp_rank)))


def _operations(config: TrainConfig, model: ModelConfig, pp_rank: int) -> float:
    """Returns one rank's floating-point operations for a micro-batch, forward and backward.

    The forward pass has two operations per weight and token, the backward pass twice as many (6N).
    Attention's two products are counted as causal kernels compute them, over half of the square.
    """
    h, layers = model.hidden_size, _layers(config, model, pp_rank)
    matrices = h * (2 * model.query_size + 2 * model.kv_size + 3 * model.ffn_hidden_size)
    attention = 2 * model.query_size * config.seq_length
    again = _share(config, model, pp_rank)
    forward = layers * ((3 + again) * 2 * matrices)
    forward += layers * (3 + again + (config.recompute == "selective")) * attention
    if pp_rank == config.pp - 1:
        forward += 3 * 2 * h * model.padded_vocab_size
    return forward * _tokens(config) / config.tp


def _weights(config: TrainConfig, model: ModelConfig, pp_rank: int) -> float:
    """Returns the bytes of weights and gradients that one rank moves for a micro-batch of any size.

    The weights are read in both passes; the gradients of those that are trained are written, read,
    and added in fp32.
    """
    counts, element = parameters_of_rank(config, model, pp_rank), DTYPE_BYTES[config.dtype]
    weight = (2 + _share(config, model, pp_rank)) * element
    gradient = 2 * element + 2 * 4
    frozen = counts.total - counts.trained
    return counts.total * (weight + gradient) - frozen * gradient


def _tokens(config: TrainConfig) -> float:
    """Returns the number of tokens of a micro-batch on one rank."""
    return config.micro_batch_size * config.row_length / config.cp


def _messages(config: TrainConfig, model: ModelConfig, chip: "Chip", pp_rank: int) -> float:
    """Returns the seconds of one rank's messages for a micro-batch, forward and backward."""
    tp, cp, pp = config.tp, config.cp, config.pp
    layers = _layers(config, model, pp_rank)
    again = _share(config, model, pp_rank)
    each = _tokens(config) * DTYPE_BYTES[config.dtype]
    seconds = 0.0
    if tp > 1:
        # Two gathers and two scatters a pass; sequence parallelism gathers two inputs once more
        # for the gradients of the weights.
        times = 8 + 4 * again + (2 if config.sequence_parallel else 0)
        piece = each * model.hidden_size * (tp - 1) / tp
        seconds += layers * times * piece / chip.bandwidth(tp, tp)
    if cp > 1:
        # Queries, keys, values and the context change from positions to heads and back.
        size = each * (2 * model.query_size + 2 * model.kv_size) / tp * (cp - 1) / cp
        seconds += layers * (2 + again) * size / chip.bandwidth(cp, tp * cp)
    if pp > 1:
        shards = tp if config.sequence_parallel else 1
        size = each * model.hidden_size / shards
        # With several chunks, one sends while another works: those further messages cost nothing.
        seconds += 2 * size / chip.bandwidth(2, tp * cp * config.dp + 1)
    return seconds


def _update(config: TrainConfig, model: ModelConfig, chip: "Chip") -> float:
    """Returns the seconds to reduce the gradients, to update the weights, and to gather them."""
    count = max(parameters_of_rank(config, model, pp_rank).trained for pp_rank in range(config.pp))
    ranks = config.dp * config.cp
    owned = count / ranks if config.distributed_optimizer else count
    seconds = owned * _ADAM_BYTES / chip.memory_bandwidth
    if ranks == 1:
        return seconds
    # A reduction whose result all want is a scatter and a gather.
    gradients = 0 if config.overlap_grad_reduce else 4 if config.distributed_optimizer else 8
    weights = DTYPE_BYTES[config.dtype] if config.distributed_optimizer else 0
    weights = 0 if config.overlap_param_gather else weights
    piece = count * (ranks - 1) / ranks
    return seconds + piece * (gradients + weights) / chip.bandwidth(ranks, config.tp * ranks)
