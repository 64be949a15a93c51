"""`glm3 preprocess`: turns raw data into token files, in parallel and in bounded memory.

Begin with `run`: `preprocess` is a whole run. The data passes these modules in turn:

- `readers` read files of every format as chunks of rows.
- `workers` encodes chunks in several processes. There `handlers` choose a function of `rows`, which
  turns a row into texts or messages, and encode the result with `tokens` as a `document`. `turns`
  reads the turns of a conversation in all their spellings, `trained` which of them are trained, and
  `fields` any field; `results` puts what tools returned into the order of the calls, and `unread`
  refuses what would be lost. The room `preferences` does so with chosen and rejected answers.
- `writing` appends the documents to files and can go on with a killed run. It describes the result
  by its `counts` and its `job`: the inputs and the settings.

`merge` joins the parts of a run that several machines have made.

Outside of this folder, the command line and training import `run` and `job`, and the types of what
a run returns from `writing.write`. Nothing here imports torch, megatron or `data.samples`.
"""
