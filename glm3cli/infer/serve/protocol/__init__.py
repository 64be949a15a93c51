"""OpenAI's forms: what clients send, and what they get.

`bodies` has the fields of requests, and refuses what is wrong with them. `asked` makes of a body
what the engine is asked: prompts of token ids, and how they are continued; `called` writes the
grammar of a tool call that must come, and `tokens` answers for the tokenizer alone. `choices` makes
text and tool calls of the tokens of an answer, as they come; `completion` and `chat`, which share
`answer`, write them as one object or as a stream, and `logprobs` the log-probabilities. `errors`
has what a client gets instead, and `document` describes all of it in the form of OpenAPI.

The fields follow the API reference of OpenAI (platform.openai.com/docs/api-reference, completions
and chat), with `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and the addresses for the
tokenizer as vLLM's server has them. Nothing here knows HTTP but the status numbers of `errors`.
"""
