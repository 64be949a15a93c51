"""ChatGLM3 as a megatron-core GPTModel."""
