"""Ways of decoding beyond a draw from the logits, each in a file of its own.

Begin with `penalties`, which change logits before a token is chosen, or `choice`, which chooses the
tokens of a whole forward pass at any tensor and pipeline parallel size. `stops` ends a text where a
given string comes.

This room works on logits and token ids. It imports `sampling` and `pipeline` of infer/, and the
tokenizer for texts; the engine imports it.
"""
