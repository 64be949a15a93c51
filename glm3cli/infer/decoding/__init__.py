"""Ways of decoding beyond a draw from the logits, each in a file of its own.

Begin with `rules.Decoding`, all that can be said about how a continuation is made. `choice` chooses
the tokens of a whole forward pass at any tensor and pipeline parallel size. `penalties` changes
logits before a token is chosen, `grammar` leaves the tokens that a JSON schema allows (`schemas`
prepares one), `beams` searches, `lookup` guesses the next tokens from the text so far, and `stops`
ends a text where a given string comes.

This room works on logits and token ids. It imports `sampling`, `pipeline` and `requests` of infer/,
and the tokenizer for texts; `batching` and `model` import it.
"""
