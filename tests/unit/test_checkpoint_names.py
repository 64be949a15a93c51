from glm3cli.checkpoint.names import WEIGHTS, Stage, is_ignored, slots
from glm3cli.config.model import PRESETS


def test_ten_rows_with_names_of_their_own():
    assert len(WEIGHTS) == 10
    for layout in ("logical", "chatglm", "glm", "legacy", "mcore", "dist"):
        assert len({getattr(weight, layout) for weight in WEIGHTS}) == 10


def test_layer_names_have_a_place_for_the_layer():
    for weight in WEIGHTS:
        for layout in ("chatglm", "glm", "legacy", "mcore"):
            assert ("{}" in getattr(weight, layout)) == (weight.stage is Stage.LAYER)


def test_slots_are_the_199_tensors_of_the_6b_model():
    names = [weight.name("chatglm", layer) for weight, layer in slots(28)]
    assert len(names) == len(set(names)) == 199
    assert names[0] == "transformer.embedding.word_embeddings.weight"
    assert names[-1] == "transformer.output_layer.weight"


def test_shapes_add_up_to_the_number_of_parameters():
    model = PRESETS["6b"]
    total = 0
    for weight, _ in slots(model.num_layers):
        size = 1
        for extent in weight.shape(model):
            size *= extent
        total += size
    assert total == model.num_parameters == 6_243_584_000


def test_the_parts_of_a_weight_have_its_rows_together():
    model = PRESETS["6b"]
    for weight, layer in slots(2):
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
    output = WEIGHTS[-1]
    assert output.extra_state_name("legacy") == "language_model/output_layer/_extra_state"
    assert is_ignored(output.extra_state_name("mcore"))
    assert is_ignored("transformer.rotary_pos_emb.inv_freq")
    assert not is_ignored("transformer.output_layer.weight")
