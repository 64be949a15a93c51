"""How the members of the family write turns, tools and calls.

Begin with `base.ChatFormat`, what every format can do: prompts, training samples, and the calls in
an answer. `roles` has the formats with a token for each role (ChatGLM3, GLM-4, CodeGeeX4, and the
0414 models), `rounds` ChatGLM2's numbered rounds, and `code` CodeGeeX2's comments. `python_calls`
and `json_calls` write and read calls in the two ways that models do. `table` has the formats by
their names in the table of members (config/family).
"""
