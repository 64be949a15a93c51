"""Generation and scoring with a trained model, at any tensor and pipeline parallel size.

Begin with `model.Model`, which commands and programs use: it continues texts and scores them. Below
it, `engine.Engine` works on token ids: `requests` are added, and each step makes tokens for those
that run, which have `rows` of the KV cache; `scoring` scores tokens that are given. `pipeline` runs
the forward passes, in which each text may have an adapter of its own (`selected`), `steps` those
that a device captures as graphs, `sampling` draws a token from logits, and `decoding` holds what
else decides on tokens.
`opening` checks what can be checked without torch, and has `load` build the model on this rank.
`generate` is the command of that name, the room `prompts` its option --prompts-file, the room
`chat` its option --chat, and the room `serve` its option --serve.

`opening`, `generate`, `prompts.run`, `chat.talk` and `serve.run` can be imported without torch.
cli/ calls the last four; evals/ uses `opening`, `load`, `Model`, `Engine` and `Sampling`; programs
come in by `glm3cli.open_model`.
"""
