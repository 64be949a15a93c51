"""The shapes that --model-config knows by name."""

from glm3cli.config.model import ModelConfig

_NINE_B = ModelConfig(
    num_layers=40,
    hidden_size=4096,
    ffn_hidden_size=13696,
    num_attention_heads=32,
    num_query_groups=2,
    kv_channels=128,
    padded_vocab_size=151552,
    seq_length=131_072,
    layernorm_epsilon=1.5625e-07,
    rope_ratio=500.0,
    torch_dtype="bf16",
)
# ChatGLM3-6B's, GLM-4-9B-Chat's, those of GLM-4-0414, and a small one for trials.
PRESETS: dict[str, ModelConfig] = {
    "6b": ModelConfig(
        num_layers=28,
        hidden_size=4096,
        ffn_hidden_size=13696,
        num_attention_heads=32,
        num_query_groups=2,
        kv_channels=128,
        padded_vocab_size=65024,
        seq_length=8192,
    ),
    "9b": _NINE_B,
    "9b-0414": _NINE_B.model_copy(
        update={
            "seq_length": 32_768,
            "layernorm_epsilon": 1e-5,
            "rope_ratio": 1.0,
            "sandwich_norms": True,
        }
    ),
    "32b-0414": ModelConfig(
        num_layers=61,
        hidden_size=6144,
        ffn_hidden_size=23040,
        num_attention_heads=48,
        num_query_groups=2,
        kv_channels=128,
        padded_vocab_size=151552,
        seq_length=32_768,
        add_qkv_bias=False,
        sandwich_norms=True,
        torch_dtype="bf16",
    ),
    "tiny": ModelConfig(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=16,
        padded_vocab_size=65024,
        seq_length=512,
        torch_dtype="fp32",
    ),
}
