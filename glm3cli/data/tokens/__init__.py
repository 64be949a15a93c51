"""Turns text and conversations into token ids and back; without torch.

Begin with `tokenizer`: `Tokenizer` gives exactly the ids of ChatGLM3's own tokenizer. `chat` turns
conversations into prompts (`build_prompt`) and training samples (`build_sample`), and replies back
into messages (`parse_reply`). `calls` reads the tool calls of an answer, whole or token by token.
All may be imported from everywhere above: preprocess, samples, training, generation and evaluation.

`fast_encoder` makes encoding faster and is used by `tokenizer` only. `fast_tokenizer` writes the
tokenizer as files for transformers and is used by the export of checkpoints.
"""
