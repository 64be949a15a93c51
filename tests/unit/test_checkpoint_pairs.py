"""From every layout to every layout, bit by bit, at shapes and cuts that nobody has picked."""

import shutil
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.names import Layout
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig
from tests.support.checkpoints import assert_same, random_weights, read_all, write_hf
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = get_args(Layout)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """All that tensor parallelism over 8 ranks can cut."""
    return ModelConfig(
        num_layers=draw(st.integers(1, 6)),
        hidden_size=draw(st.sampled_from([8, 24, 40])),
        ffn_hidden_size=8 * draw(st.integers(1, 4)),
        num_attention_heads=8,
        num_query_groups=draw(st.sampled_from([1, 2, 4])),
        kv_channels=draw(st.sampled_from([4, 8, 12])),
        padded_vocab_size=8 * draw(st.integers(1, 5)),
        seq_length=16,
        rope_ratio=draw(st.sampled_from([1.0, 50.0])),
        torch_dtype=draw(st.sampled_from(list(DTYPES))),
    )


@st.composite
def cuts(draw: st.DrawFn, model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Options that may be given for a layout; none where it isn't cut."""
    if layout not in ("mcore", "legacy"):
        return {}
    most = 8 if layout == "mcore" else model.num_query_groups  # legacy ranks have whole groups
    tp = draw(st.sampled_from([size for size in (1, 2, 4, 8) if size <= most]))
    layers = model.num_layers
    shape = draw(st.sampled_from(["even", "uneven", "interleaved"]))
    if shape == "uneven" and layers > 1:
        borders = st.integers(1, layers - 1)
        inner = sorted(draw(st.sets(borders, min_size=1, max_size=3)))
        sizes = [b - a for a, b in zip([0, *inner], [*inner, layers], strict=True)]
        if len(set(sizes)) > 1:
            return {"tp": tp, "pp": len(sizes), "layers_per_stage": ",".join(map(str, sizes))}
    pairs = [(p, v) for p in (1, 2, 3, 4) for v in (1, 2, 3) if layers % (p * v) == 0]
    pairs = [(p, v) for p, v in pairs if v == 1 or (p > 1 and shape == "interleaved")]
    pp, vpp = draw(st.sampled_from(pairs))
    return {"tp": tp, "pp": pp, "vpp": vpp}


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
@settings(max_examples=4)
@given(data=st.data())
def test_there_and_back(tmp_path_factory, first, second, data):
    model = data.draw(models())
    ways = {layout: data.draw(cuts(model, layout)) for layout in (first, second)}
    folder = tmp_path_factory.mktemp("pair")
    weights = random_weights(model, DTYPES[model.torch_dtype])
    source = write_hf(folder / "hf", model=model, weights=weights)
    shutil.copy(tiny_tokenizer_folder() / "tokenizer.model", source)
    steps = [source, folder / "first", folder / "second", folder / "back"]
    for old, new, layout in zip(steps, steps[1:], (first, second, "chatglm"), strict=False):
        parallel = ModelParallelConfig.parse(ways.get(layout, {}))
        convert(old, new, ConvertOptions(layout=layout, parallel=parallel))
        opened = open_source(new)
        assert (opened.layout, opened.model) == (layout, model)
        assert opened.parallel == parallel
        assert_same(read_all(new), weights)
    shutil.rmtree(folder)
