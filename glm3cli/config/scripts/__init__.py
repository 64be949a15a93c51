"""Reads the shell scripts of ModelLink and MindSpeed-LLM, and says what they amount to in glm3.

Begin with `translate`. `shell` reads a script, without executing it, down to the programs that it
starts and their arguments: `words` cuts the text, `grammar` groups the words into commands, and
`expansion` puts values in place of variables. `training`, `running` and `preparing` turn the flags
of a program into a `translation`: options, and what became of each flag. `flags` has the tables of
flags, and `shapes` compares those of a model's shape with its config.json.

glm3 reads bash itself, since the readers on the registry are under the GPL, or need a compiled
parser and would still leave the variables to us.
"""
