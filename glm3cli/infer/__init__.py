"""Generation and scoring with a trained model, at any tensor and pipeline parallel size.

`model.Model` is what programs and commands use: texts in, texts and log-probabilities out. Below
it, `engine.Engine` knows token ids alone: requests are added, and each step makes one token for all
that run. `sampling` turns logits into a token; `load` opens a model on a rank, `opening` checks
first what can be checked without torch. `generate` is the command of that name, `conversation` a
chat.

Begin with `model.py`, then `engine.py`. From outside: `evals` takes `opening`, `Model` and the
engine; cli takes `generate`; `glm3cli.open_model` is the way in for programs.
"""
