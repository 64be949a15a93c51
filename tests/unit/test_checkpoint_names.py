import math

from glm3cli.checkpoint.names import WEIGHTS, Stage, is_ignored, slots, weights_of
from glm3cli.config.presets import PRESETS


def test_rows_have_names_of_their_own_and_a_model_the_rows_of_its_traits():
    assert len(WEIGHTS) == 12
    for layout in ("logical", "chatglm", "glm", "legacy", "mcore", "dist"):
        assert len({getattr(weight, layout) for weight in WEIGHTS}) == 12
    counts = {name: len(weights_of(model)) for name, model in PRESETS.items()}
    assert counts == {"6b": 10, "9b": 10, "9b-0414": 12, "32b-0414": 11, "tiny": 10}


def test_layer_names_have_a_place_for_the_layer():
    for weight in WEIGHTS:
        for layout in ("chatglm", "glm", "legacy", "mcore"):
            assert ("{}" in getattr(weight, layout)) == (weight.stage is Stage.LAYER)


def test_slots_are_the_199_tensors_of_the_6b_model():
    names = [weight.name("chatglm", layer) for weight, layer in slots(PRESETS["6b"])]
    assert len(names) == len(set(names)) == 199
    assert names[0] == "transformer.embedding.word_embeddings.weight"
    assert names[-1] == "transformer.output_layer.weight"


def test_shapes_add_up_to_the_number_of_parameters():
    found = {}
    for name, model in PRESETS.items():
        found[name] = sum(math.prod(weight.shape(model)) for weight, _ in slots(model))
        assert found[name] == model.num_parameters
    assert found["6b"] == 6_243_584_000
    assert found["9b"] == 9_399_951_360
    assert found["32b-0414"] == 32_566_081_536


def test_the_parts_of_a_weight_have_its_rows_together():
    model = PRESETS["6b"]
    for weight, layer in slots(model, 2):
        parts = weight.parts("glm", model, layer)
        assert sum(shape[0] for shape in parts.values()) == weight.shape(model)[0]
        assert weight.parts("chatglm", model, layer) == {
            weight.name("chatglm", layer): weight.shape(model)
        }
    qkv = next(weight for weight in WEIGHTS if weight.logical == "qkv_bias")
    assert qkv.parts("glm", model, 7) == {
        "model.layers.7.self_attn.q_proj.bias": (4096,),
        "model.layers.7.self_attn.k_proj.bias": (256,),
        "model.layers.7.self_attn.v_proj.bias": (256,),
    }


def test_norms_are_found_under_their_transformer_engine_names():
    norm = next(weight for weight in WEIGHTS if weight.logical == "input_norm")
    assert norm.names("mcore", 3) == (
        "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
    )
    assert "decoder.layers.input_layernorm.weight" in norm.names("dist", 3)
    assert "decoder.layers.3.input_layernorm.weight" in norm.names("dist", 3)


def test_extra_state_stands_beside_the_weight():
    output = next(weight for weight in WEIGHTS if weight.logical == "output")
    assert output.extra_state_name("legacy") == "language_model/output_layer/_extra_state"
    assert is_ignored(output.extra_state_name("mcore"))
    assert is_ignored("transformer.rotary_pos_emb.inv_freq")
    assert not is_ignored("transformer.output_layer.weight")
