"""A plan counts the operators that really run: those of a step, recorded on meta tensors."""

from collections import Counter
from typing import Any

import pytest
import torch

from glm3cli.config.model import ModelConfig
from glm3cli.config.presets import PRESETS
from glm3cli.device import require_active
from glm3cli.forecast.record import StageWork, record_stage
from glm3cli.forecast.recorder import Operator, recording
from tests.support.tiny import TINY, train_config

SIX_B = PRESETS["6b"]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """As if no torchrun had started this process."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def record(
    model: ModelConfig = TINY, kind: str = "npu", pp_rank: int = 0, ranks: int = 1, **options: Any
) -> StageWork:
    config = train_config(dry_run=True, planned_world_size=ranks, **options)
    return record_stage(config, model, kind, pp_rank)


def passes(work: StageWork) -> list[Operator]:
    return [one for chunk in work.chunks for one in (*chunk.forward, *chunk.backward)]


def flops(work: StageWork, kind: str) -> float:
    return sum(one.flops for one in passes(work) if one.kind == kind)


# --- operations ---


def matrices(model: ModelConfig) -> int:
    """Returns the number of weights of all matrix products, counted from the architecture."""
    h = model.hidden_size
    layer = h * (model.query_size + 2 * model.kv_size) + model.query_size * h
    layer += 3 * h * model.ffn_hidden_size
    return model.num_layers * layer + h * model.padded_vocab_size


@pytest.mark.parametrize("kind", ["npu", "cpu", "cuda"])
def test_matrix_products_are_six_per_weight_and_token(kind: str) -> None:
    work = record(kind=kind, micro_batch_size=2, seq_length=32)
    assert flops(work, "matrix") == 6 * matrices(TINY) * 2 * 32


@pytest.mark.parametrize("kind", ["npu", "cpu"])
def test_attention_is_seven_products_over_half_of_the_square(kind: str) -> None:
    work = record(kind=kind, micro_batch_size=2, seq_length=32)
    pairs = 2 * TINY.num_attention_heads * 32 * 32 / 2
    assert flops(work, "attention") == TINY.num_layers * 7 * 2 * pairs * TINY.kv_channels


def test_stages_share_the_operations() -> None:
    whole = record()
    parts = [record(pp_rank=rank, ranks=2, pp=2) for rank in range(2)]
    for kind in ("matrix", "attention"):
        assert sum(flops(part, kind) for part in parts) == flops(whole, kind)


def test_chunks_share_the_operations() -> None:
    options = {"pp": 2, "ranks": 2, "global_batch_size": 8}
    whole = record(**options)
    parts = record(vpp=2, **options)
    assert len(parts.chunks) == 2
    assert flops(parts, "matrix") == flops(whole, "matrix")


def test_ranks_share_the_operations() -> None:
    whole = record()
    for axis in ("tp", "cp"):
        assert 2 * flops(record(ranks=2, **{axis: 2}), "matrix") == flops(whole, "matrix")


def test_recomputation_runs_the_layers_forward_once_more() -> None:
    layers = 2 * (matrices(TINY) - TINY.hidden_size * TINY.padded_vocab_size) * 32
    plain, full = record(), record(recompute="full")
    assert flops(full, "matrix") - flops(plain, "matrix") == layers
    assert flops(full, "attention") == flops(plain, "attention") * 9 / 7
    selective = record(recompute="selective")
    assert flops(selective, "matrix") == flops(plain, "matrix")
    assert flops(selective, "attention") == flops(plain, "attention") * 9 / 7


def test_samples_of_a_pack_see_themselves_alone() -> None:
    """Pairs of different samples, which the operator leaves out, are not counted."""
    from glm3cli.device.npu.operators import define

    define()
    query, key = (torch.empty(96, heads, 16, device="meta") for heads in (4, 2))
    mask = torch.empty(2048, 2048, dtype=torch.bool, device="meta")
    with recording() as found:
        torch.ops.npu.npu_fusion_attention(
            query, key, key, 4, "TND", atten_mask=mask, actual_seq_qlen=[32, 96],
            actual_seq_kvlen=[32, 96], sparse_mode=2,
        )  # fmt: skip
    assert found[0].flops == 2 * 2 * 4 * 16 * (32**2 + 64**2) / 2


# --- bytes ---


def test_bytes_are_read_and_written_once() -> None:
    one, other = (torch.empty(4, 6, device="meta") for _ in range(2))
    with recording() as found:
        one + other
        one.add_(other)
        one.copy_(other)
        one.zero_()
        one.t()
        torch.empty_like(one)
        one.expand(5, 4, 6).sum()
        torch.mul(one, other, out=torch.empty(4, 6, device="meta"))
    size = 4 * 6 * 4
    expected = [3, 3, 2, 1, 1, 3]
    assert [round(call.bytes / size, 1) for call in found] == pytest.approx(expected, abs=0.1)


# --- messages ---


def sent(operators: list[Operator]) -> Counter[tuple[str, int]]:
    return Counter(
        (one.name.removeprefix("c10d."), one.bytes) for one in operators if one.kind == "message"
    )


def test_messages_of_tensor_parallel_layers() -> None:
    work = record(ranks=2, tp=2, micro_batch_size=2, seq_length=32, kind="cpu")
    whole = 32 * 2 * TINY.hidden_size * 4
    forth, back = sent(work.chunks[0].forward), sent(work.chunks[0].backward)
    # Two layers' inputs are gathered and two outputs scattered; then the output layer's input.
    assert forth["_allgather_base_", whole] == 2 * TINY.num_layers + 1
    assert forth["_reduce_scatter_base_", whole] == 2 * TINY.num_layers + 1  # the embedding's
    # Backward the other way round, and the inputs once more for the gradients of the weights.
    assert back["_reduce_scatter_base_", whole] == 2 * TINY.num_layers + 1
    assert back["_allgather_base_", whole] == 2 * (2 * TINY.num_layers + 1)


def test_messages_of_context_parallel_attention() -> None:
    work = record(ranks=2, cp=2, seq_length=32)
    query, kv = (16 * size * 4 for size in (TINY.query_size, TINY.kv_size))
    expected = {("alltoall_base_", query): 4 * TINY.num_layers}
    expected["alltoall_base_", kv] = 4 * TINY.num_layers
    assert sent(passes(work)) == expected


@pytest.mark.parametrize("distributed", [True, False])
def test_messages_of_the_update(distributed: bool) -> None:
    work = record(ranks=2, distributed_optimizer=distributed)
    size = 4 * TINY.num_parameters
    found = [one for one in work.update if one.bytes > 100 and one.kind == "message"]
    names = [one.name.partition(".")[2].partition("_coalesced")[0] for one in found]
    expected = ["reduce_scatter_tensor", "allgather_into_tensor"] if distributed else ["allreduce"]
    assert names == expected
    for one in found:  # buffers are padded so that the ranks' pieces are of one size
        assert size <= one.bytes < size * 1.01 + 4096
        assert one.ranks == (0, 1)


def test_overlapped_messages_are_found_once_per_step() -> None:
    work = record(ranks=2, overlap_grad_reduce=True, overlap_param_gather=True)
    assert not sent(passes(work))
    assert [one.name for one in work.weights] == ["c10d.allgather_into_tensor_coalesced_"]


# --- against what really runs ---


def test_what_is_planned_for_this_cpu_is_what_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from glm3cli.parallel.groups import open_grid
    from tests.support.training import build

    # Whose library multiplies depends on the processor, for which no plan is made.
    monkeypatch.setattr(require_active(), "without_kernels", ("linear",))
    options = {"seq_length": 32, "global_batch_size": 1}
    with open_grid(train_config(**options)) as grid:
        _, train_step, loader = build(options, grid)
        train_step.run(loader, 0)
        with recording() as real:
            train_step.run(loader, 0)
    work = record(kind="cpu", **options)
    planned = [*passes(work), *work.update]
    extra = Counter((one.name, one.bytes, one.flops) for one in real)
    extra.subtract(Counter((one.name, one.bytes, one.flops) for one in planned))
    # All that is planned runs; beside it, the loader's and the log's handful of numbers.
    assert min(extra.values()) >= 0
    assert sum(size * count for (_, size, _), count in extra.items()) < 3000
    assert sum(extra.values()) < 25


# --- what is never made ---


def test_no_square_of_the_sequence_and_no_expanded_keys_on_ascend() -> None:
    """The real model has 8,192 tokens here: one head's scores alone would be 64 Mi numbers."""
    length = 8192
    work = record(SIX_B, ranks=2, pp=2, seq_length=length, dtype="bf16", pp_rank=1)
    shapes = {shape for one in passes(work) for shape in one.shapes}
    assert any(length in shape for shape in shapes)
    assert not [shape for shape in shapes if shape.count(length) > 1]
    heads = length, 1, SIX_B.num_attention_heads, SIX_B.kv_channels
    made = [one.shapes for one in passes(work) if heads in one.shapes]
    assert len(made) == 2 * SIX_B.num_layers // 2  # the rotated queries and their gradients alone
    attention = [one for one in passes(work) if one.kind == "attention"]
    kv, query = (length, 1, SIX_B.kv_size), (length, 1, SIX_B.query_size)
    softmax = (1, SIX_B.num_attention_heads, length, 8)
    assert {one.shapes for one in attention} == {
        (query, softmax, softmax, (0,)),
        (query, kv, kv, (0,), (0,)),
    }
