"""The `glm3` program: it parses options, checks what is cheap, calls the core, and prints results.

Begin with `app`, which puts the commands together and turns every error into a sentence and an exit
code. There is one module per command or group of commands (`convert`, `preprocess`, `train`,
`generate`, `evaluate`, `doctor`, `demo`); each function in it is a command, its docstring the help
text. `options` makes a command's flags from its config class, and reads `--config` files.

Nobody imports this room but `glm3cli.__main__` and the tests. Its modules may import every other
room, but torch and other heavy packages only inside a command, after the checks: `--help` and wrong
options are answered at once.
"""
