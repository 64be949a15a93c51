"""The tokenizer as files for transformers, which needs no remote code then.

Begin with `tokenizer`, which puts tokenizer.json and tokenizer_config.json together. `pieces` and
`ranks` make the parts that depend on the kind of the vocabulary: `pieces` rebuilds the merges of a
sentencepiece model, and `ranks` those of tiktoken's ranks. The export of checkpoints uses it.
"""
