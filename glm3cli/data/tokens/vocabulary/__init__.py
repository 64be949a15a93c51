"""The tokens of text, in the two kinds of files that the family's tokenizers have.

Begin with `base.Vocabulary`, what both can do. `pieces` reads a sentencepiece model (ChatGLM2 and
ChatGLM3), which `pieces_json` rebuilds from a tokenizer.json, and `fast_encoder` makes faster;
`ranks` reads tiktoken's ranks, or a tokenizer.json with the same content (GLM-4). `opening` tells
the kinds apart, and `files` finds them. Special tokens are the tokenizer's.
"""
