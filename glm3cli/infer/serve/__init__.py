"""`glm3 generate --serve`: OpenAI's API on a model, at any tensor and pipeline parallel size.

Begin with `run.serve`. Rank 0 has two threads. The main one works (`work`): between the steps of
the engine it takes `orders` and tells them to the other ranks, which do the same. The other thread
runs an event loop with the HTTP `app`: it reads requests, makes orders of them, and writes answers
as the engine's updates come. `queries` is between the two: it knows what is under way, refuses what
is too much, and ends what nobody waits for any more. `guard` stands before the app, with the API
key and the limit on sizes; `metrics` counts. The room `protocol` knows OpenAI's forms.

`run` can be imported without torch, and what the extra `serve` installs is imported by the modules
that `run` imports inside its functions.
"""
