"""A chat with a model: turns, commands, and tools that the model calls.

Begin with `session.Session`, which holds a chat on rank 0, with a `Terminal` that the command
line gives it. `conversation.Conversation` has the turns, and saves and loads them. `answers` has
all ranks answer together, and stops them together. `toolbox` reads the tools of a JSON file or of a
file of Python functions, which `functions` describes without running it, and calls these.
"""
