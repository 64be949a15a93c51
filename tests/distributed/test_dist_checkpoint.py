"""megatron-core itself loads the distributed checkpoints that convert writes."""

from pathlib import Path
from typing import Any

import pytest

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.config.convert import ConvertOptions
from tests.support.checkpoints import SMALL, assert_same, random_weights, read_all, write_hf
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist


def load(dist: Path, hf: Path, tp: int, pp: int) -> list[str]:
    """Loads with the stock local layer spec; gives the names of parameters that differ."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from glm3cli.checkpoint.cuts import cut
    from glm3cli.checkpoint.layouts.opening import open_source
    from glm3cli.checkpoint.names import Stage, slots

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp, pp)
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=SMALL.num_layers,
            hidden_size=SMALL.hidden_size,
            ffn_hidden_size=SMALL.ffn_hidden_size,
            num_attention_heads=SMALL.num_attention_heads,
            num_query_groups=SMALL.num_query_groups,
            kv_channels=SMALL.kv_channels,
            add_bias_linear=False,
            add_qkv_bias=True,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            use_cpu_initialization=True,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=torch.float32,
        )
        stage = parallel_state.get_pipeline_model_parallel_rank()
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=SMALL.padded_vocab_size,
            max_sequence_length=SMALL.seq_length,
            pre_process=stage == 0,
            post_process=stage == pp - 1,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        wanted: dict[str, Any] = model.sharded_state_dict()
        loaded = dist_checkpointing.load(wanted, str(dist), strict="raise_all")
        model.load_state_dict({name: loaded[name] for name in wanted})
        parameters = dict(model.named_parameters())
        source = open_source(hf)
        for weight, layer in slots(SMALL):
            per_stage = SMALL.num_layers // pp
            local = None if layer is None else layer - stage * per_stage
            name = weight.name("mcore", local)
            if weight.stage is Stage.LAYER and local not in range(per_stage):
                continue
            if name in parameters:
                pieces = cut(source.read(weight, layer), weight.cut, tp, SMALL)
                piece = pieces[parallel_state.get_tensor_model_parallel_rank()]
                if torch.equal(parameters[name], piece.float()):
                    del parameters[name]
        return sorted(parameters)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_a_stock_gpt_model_loads_it(ranks, tmp_path, tp, pp):
    hf = write_hf(tmp_path / "hf")
    convert(hf, tmp_path / "dist", ConvertOptions(layout="dist"))
    found = ranks.run(tp * pp, load, tmp_path / "dist", hf, tp, pp)
    assert found == [[]] * (tp * pp)


def save(dist: Path, hf: Path, cuts: dict[str, int]) -> None:
    """Saves our own model as a training run does."""
    import torch
    from megatron.core import dist_checkpointing

    from glm3cli.checkpoint.layouts.opening import open_source
    from glm3cli.checkpoint.load import load_weights
    from glm3cli.config.parallel import ParallelConfig
    from glm3cli.model.build import build_chunks, transformer_config, unwrap
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**cuts)
    with open_grid(parallel) as grid:
        config = transformer_config(SMALL, parallel, "bf16", sequence_parallel=False)
        chunks = build_chunks(SMALL, parallel, config)
        load_weights([unwrap(chunk) for chunk in chunks], open_source(hf), parallel, grid)
        state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        state["progress"] = {"iteration": 3}
        dist_checkpointing.save(state, str(dist), ("torch_dist", 1))
        torch.distributed.barrier()


@pytest.mark.parametrize(
    "cuts", [{"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 2, "vpp": 2}], ids=lambda cuts: str(cuts)
)
def test_a_training_checkpoint_of_any_cut_is_read(ranks, tmp_path, cuts):
    hf = write_hf(tmp_path / "hf")
    dist = tmp_path / "run/iter_0000003"
    dist.mkdir(parents=True)
    (dist / "config.json").write_bytes((hf / "config.json").read_bytes())
    world_size = cuts.get("tp", 1) * cuts.get("pp", 1)
    ranks.run(world_size, save, dist, hf, cuts)
    assert open_source(tmp_path / "run").iteration == 3
    expected = {name: tensor.bfloat16() for name, tensor in random_weights().items()}
    assert_same(read_all(tmp_path / "run"), expected)
    convert(tmp_path / "run", tmp_path / "back", ConvertOptions(layout="chatglm"))
    assert_same(read_all(tmp_path / "back"), expected)
    assert open_source(tmp_path / "back").model.torch_dtype == "bf16"


def children_after_a_save(folder: Path) -> list[bool]:
    """Of every process that this rank has started and that lives: whether it has loaded torch."""
    import psutil

    from tests.support.training import train_steps

    train_steps({}, 0, 1, folder)
    children = psutil.Process().children(recursive=True)
    return [any("libtorch" in file.path for file in child.memory_maps()) for child in children]


def test_the_process_of_the_queue_does_without_torch(tmp_path):
    """Each rank has one; importing torch costs more than a small checkpoint."""
    fresh = RankPool()  # whose ranks have no other children
    [loaded] = fresh.run(1, children_after_a_save, tmp_path)
    fresh.close()
    assert loaded
    assert not any(loaded)


def draw_again(folder: Path) -> list[tuple[float, float, float]]:
    """Returns numbers drawn after a save, and those drawn after that save was loaded."""
    import random

    import numpy as np
    import torch

    from glm3cli.checkpoint.run.resume import load_training, save_request
    from glm3cli.parallel.groups import open_grid
    from tests.support.tiny import train_config
    from tests.support.training import build

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with open_grid(train_config(), seed=5) as grid:
        _, train_step, _ = build({}, grid)
        parts = (train_step.chunks, train_step.optimizer, train_step.scheduler)
        drawn()
        save_request(folder, *parts, {"iteration": 1}, grid).execute_sync()
        found = [drawn()]
        _, missing = load_training(folder, *parts, grid)
        assert missing == []
        return [*found, drawn()]


def test_random_generators_go_on_where_they_were(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    for first, second in ranks.run(2, draw_again, tmp_path / "checkpoint"):
        assert first == second
