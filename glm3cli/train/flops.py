"""Floating-point operations of training, for TFLOP/s in the log."""

from glm3cli.config.model import ModelConfig


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Operations per trained token: forward and backward, causal attention counted in full.

    6 x the weights of the matrix products (the embedding is a look-up) and 12 x layers x query
    size x sequence length for the attention scores and their use (PaLM, appendix B).
    """
    matrices = model.num_parameters - model.padded_vocab_size * model.hidden_size
    return 6.0 * matrices + 12.0 * model.num_layers * model.query_size * seq_length
