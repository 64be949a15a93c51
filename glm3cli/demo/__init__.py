"""`glm3 demo`: the whole chain, from a tokenizer to a score, at toy size on this machine.

Begin with `chain`, which runs every step by the `glm3` command that a user would type and checks
its result. `content` makes the inputs: documents, a tokenizer, the shape of a tiny model, the rows
of a task, and the training options. `quiz` makes the questions of a mini-MMLU from the word lists
in `words`; its CSV files are in `mmlu/`, and `corpus.txt` is the bundled text. All of these are
fixed, so that each run has the same data. `kinds` says what differs between a model of ChatGLM3's
kind and one of GLM-4's, whose vocabulary `ranks` trains.

The command line (`cli.demo`) calls `chain.run_demo`; tests take rows and documents from `content`.
"""
