"""ChatGLM3 through its whole life: convert, preprocess, pretrain, finetune, generate, eval."""

__version__ = "0.1.0"
