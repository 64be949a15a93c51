"""The plan of a run: its weights, memory, and operations, from shapes alone."""

import pytest

from glm3cli.checkpoint.names import slots
from glm3cli.config.model import ModelConfig
from glm3cli.config.presets import PRESETS
from glm3cli.config.training import TrainConfig
from glm3cli.device import DEVICES
from glm3cli.device.catalog import find_chip
from glm3cli.plan.describe import checkpoint_bytes, describe
from glm3cli.plan.estimate import predict
from glm3cli.plan.memory import memory_of_stage
from glm3cli.plan.parameters import (
    ParameterCounts,
    frozen_of_model,
    parameters_of_model,
    parameters_of_rank,
)
from glm3cli.train.progress.flops import Utilisation, flops_per_token
from tests.support.tiny import TINY, train_config

SIX_B = PRESETS["6b"]
CPU = DEVICES["cpu"].saved_for_backward


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """As if no torchrun had started this process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("model", [SIX_B, TINY], ids=["6b", "tiny"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "stages",
    [{}, {"pp": 2}, {"pp": 4}, {"pp": 2, "vpp": 2}, {"pp": 3, "layers_per_stage": "uneven"}],
    ids=str,
)
def test_stages_hold_the_whole_model_and_a_copy_of_the_norms_per_rank(model, tp, stages):
    sizes = f"1,{model.num_layers - 3},2"
    options = {**stages, "layers_per_stage": sizes} if "layers_per_stage" in stages else stages
    config = train_config(tp=tp, **options)
    held = sum(tp * parameters_of_rank(config, model, stage).total for stage in range(config.pp))
    norms = (2 * model.num_layers + 1) * model.hidden_size
    assert held == model.num_parameters + (tp - 1) * norms


def test_the_number_of_parameters_is_that_of_the_table_of_weights():
    total = 0
    for weight, _ in slots(SIX_B):
        size = 1
        for extent in weight.shape(SIX_B):
            size *= extent
        total += size
    config = train_config()
    assert parameters_of_rank(config, SIX_B, 0).total == total == 6_243_584_000
    assert parameters_of_model(config, SIX_B).total == SIX_B.num_parameters == total


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_plan_of_a_rank_is_the_model_that_it_builds(stage):
    # Embedding on the first stage, output layer and last norm on the last.
    config = train_config(pp=4, tp=2)
    h, vocab = 64, 128 * 64 // 2
    layer = 2 * h + (64 + 2 * 16) // 2 * (h + 1) + 64 * h // 2 + 3 * 96 * h // 2
    extra = {0: vocab, 3: vocab + h}.get(stage, 0)
    assert parameters_of_rank(config, TINY, stage).total == layer + extra


def in_closed_form(config: TrainConfig, model: ModelConfig, stage: int) -> int:
    """Returns the number of weights on a rank of a stage, from the sizes of the model."""
    h, tp = model.hidden_size, config.tp
    rows = (model.query_size + 2 * model.kv_size) // tp
    layer = 2 * h + rows * (h + 1) + (model.query_size * h + 3 * model.ffn_hidden_size * h) // tp
    chunks = range(config.vpp)
    layers = sum(len(config.layers_of(model.num_layers, stage, chunk)) for chunk in chunks)
    vocab = model.padded_vocab_size * h // tp
    first, last = stage == 0, stage == config.pp - 1
    return layers * layer + first * vocab + last * (vocab + h)


@pytest.mark.parametrize("model", [SIX_B, TINY], ids=["6b", "tiny"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "stages",
    [{}, {"pp": 2}, {"pp": 4}, {"pp": 2, "vpp": 2}, {"pp": 2, "layers_per_stage": "uneven"}],
    ids=str,
)
def test_the_table_of_weights_gives_the_counts_of_the_closed_formula(model, tp, stages):
    sizes = f"1,{model.num_layers - 1}"
    options = {**stages, "layers_per_stage": sizes} if "layers_per_stage" in stages else stages
    config = train_config(tp=tp, **options)
    for stage in range(config.pp):
        expected = in_closed_form(config, model, stage)
        assert parameters_of_rank(config, model, stage) == ParameterCounts(expected, expected)


def test_weights_that_are_not_trained_have_neither_gradients_nor_optimizer_state(monkeypatch):
    config = train_config(pp=2, tp=2, nproc=8, dtype="bf16")
    whole, size = memory_of_stage(config, TINY, CPU, 0), checkpoint_bytes(config, TINY)
    time = predict(config, TINY, find_chip("910B"))
    monkeypatch.setattr(
        TrainConfig, "trains", lambda _, name: "h_to_4h" in name or "post_attention" in name
    )
    part = memory_of_stage(config, TINY, CPU, 0)
    # Two layers of the stage; fc1 is cut over two ranks, the norm is not.
    trained = 2 * (2 * 96 * 64 // 2 + 64)
    assert parameters_of_rank(config, TINY, 0).trained == trained
    assert part.gradients == 4 * trained < whole.gradients
    assert part.optimizer == 12 * trained // config.dp < whole.optimizer
    assert part.step == 4 * trained // config.dp < whole.step
    assert (part.weights, part.activations) == (whole.weights, whole.activations)
    everywhere = 4 * (2 * 96 * 64 + 64)
    assert checkpoint_bytes(config, TINY) == 2 * TINY.num_parameters + 12 * everywhere < size
    assert predict(config, TINY, find_chip("910B")).seconds < time.seconds


@pytest.mark.parametrize(
    ("dtype", "distributed", "weights", "optimizer"),
    [
        ("bf16", True, 2, 12 / 4),
        ("fp16", False, 2, 12),
        ("fp32", True, 4, 8 / 4),
        ("fp32", False, 4, 8),
    ],
)
def test_memory_is_bytes_per_parameter(dtype, distributed, weights, optimizer):
    config = train_config(nproc=4, dtype=dtype, distributed_optimizer=distributed)
    count = TINY.num_parameters
    memory = memory_of_stage(config, TINY, CPU, 0)
    assert memory.weights == weights * count
    assert memory.gradients == 4 * count
    assert memory.optimizer == optimizer * count
    moments_and_copy = {"bf16": 14, "fp16": 14, "fp32": 16}[dtype]
    assert checkpoint_bytes(config, TINY) == moments_and_copy * count


def test_operations_are_six_per_weight_and_the_attention():
    model = ModelConfig(
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        padded_vocab_size=10,
        seq_length=32,
    )
    # Every weight of a matrix product costs a multiplication and an addition forward, and twice
    # that backward; biases and norms are counted with them.
    layer = 2 * 8 + (16 + 16) * 9 + 16 * 8 + 3 * 16 * 8
    weights = 3 * layer + 8 + 10 * 8
    # Per token and layer: scores and their use, 2 x 2 x heads x head size x length, three times.
    attention = 3 * (3 * 4 * 16 * 32)
    assert flops_per_token(model, 32) == 6 * weights + attention
    assert flops_per_token(model, 32, "causal") == 6 * weights + attention / 2


def test_operations_of_the_6b_model():
    assert flops_per_token(SIX_B, 8192) == pytest.approx(
        6 * 5.977e9 + 12 * 28 * 4096 * 8192, rel=1e-4
    )


def test_weights_that_are_not_trained_have_no_gradients_to_compute():
    products = SIX_B.num_parameters - SIX_B.padded_vocab_size * SIX_B.hidden_size
    for options, frozen in (
        ({}, 0),
        ({"lora_rank": 8}, products),
        ({"freeze": r"\.layers\."}, products - SIX_B.hidden_size * (1 + SIX_B.padded_vocab_size)),
    ):
        config = train_config(**options)
        assert frozen_of_model(config, SIX_B) == frozen
        whole, less = flops_per_token(SIX_B, 8192), flops_per_token(SIX_B, 8192, frozen=frozen)
        assert whole - less == 2 * frozen
    text = Utilisation(SIX_B, 8192, 354.0, "a chip", products).describe()
    assert "full 6N - 2*frozen + 12*L*h*s" in text


def test_utilisation_of_a_published_run():
    # ModelLink's reference for 8K sequences, 4,297 tokens/s per device: 50.4 % causal, 57.2 % full.
    utilisation = Utilisation(SIX_B, 8192, 354.0, "a chip")
    fields = utilisation.of_rate(4297)
    assert fields["mfu"] == pytest.approx(0.572, abs=5e-4)
    assert fields["mfu_causal"] == pytest.approx(0.504, abs=5e-4)
    assert fields["tflops_per_device"] == pytest.approx(0.572 * 354, rel=1e-3)
    assert utilisation.describe() == (
        "FLOPs per token: full 6N + 12*L*h*s = 4.7138e+10 (TFLOP/s and MFU go by it), "
        "causal 6N + 6*L*h*s = 4.1501e+10 | peak 354 TFLOP/s (a chip)"
    )


def test_without_a_peak_there_is_no_utilisation():
    utilisation = Utilisation(SIX_B, 8192, None, "x86_64")
    assert utilisation.of_rate(1.0)["mfu"] is utilisation.of_rate(1.0)["mfu_causal"] is None
    assert utilisation.describe().endswith("| peak unknown for x86_64 (give --peak-tflops)")


def test_the_description_has_all_that_one_decides_by():
    config = train_config(nproc=8, tp=2, pp=2, seq_length=64, global_batch_size=16, train_iters=100)
    lines = describe(config, SIX_B).splitlines()
    assert lines[:4] == [
        "model: 6,243,584,000 parameters, 28 layers",
        "ranks: 8 = tp 2 x pp 2 x dp 2",
        "step: 16 samples in 8 micro-batches of 1 x 64 tokens per data parallel rank",
        "run: 100 steps, 102,400 tokens",
    ]
    assert [line.split(":")[0] for line in lines[4:]] == ["stage 0", "stage 1", "checkpoint"]
    assert "optimizer 5." in lines[4]
    assert ", activations 0.24 GiB, backward pass 0.01 GiB, " in lines[4]
    assert lines[4].endswith("; peak 20.35 GiB in the optimizer step")


def test_the_description_tells_chunks():
    config = train_config(nproc=2, pp=2, vpp=2)
    assert "ranks: 2 = tp 1 x pp 2 x dp 1, 2 chunks per stage" in describe(config, TINY)
