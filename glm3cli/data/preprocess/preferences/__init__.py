"""Rows that say what people prefer, and the samples that preprocess makes of them.

`rows` reads the forms that TRL, OpenAI, LLaMA-Factory and ms-swift document: a prompt with a chosen
and a rejected answer, or an answer with a label. `answers` reads the parts of them, and takes the
prompt off answers that repeat it. `handlers` makes the token ids of a sample.

`preprocess.handlers` chooses the handler; this room imports `preprocess.rows` and
`preprocess.document`, which it shares with the other handlers.
"""
