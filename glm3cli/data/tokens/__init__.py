"""Turns text and conversations into token ids and back; without torch.

Begin with `tokenizer`: `Tokenizer` gives exactly the ids of the model's own tokenizer, by a
`vocabulary` of either kind, and with the tokens that a user has `added`. `messages` has the turns
of a conversation. `chat` turns them into prompts (`build_prompt`) and training samples
(`build_sample`) by the model's chat format, of which `formats` has one for each kind of member.
`calls` reads the turns and tool calls of an answer, whole or token by token. All may be imported
from everywhere above: preprocess, samples, training, generation and evaluation.

`fast` writes the tokenizer as files for transformers and is used by the export of checkpoints.
"""
