"""Everything between raw data and the batches that training reads.

Begin with `kinds`: the two kinds of training data, text for pretraining and answers for finetuning.
`files` (with `folders`) finds input files, `prefixes` parses `--data`, `indexed` reads and writes
token files, `packs` distributes samples over sequences, and `index_cache` names the folders of
sample indices that were built in advance. They are the base of:

- `tokens`: the tokenizer and ChatGLM3's chat template.
- `preprocess`: raw data becomes token files; `glm3 preprocess`.
- `samples`: token files become training samples and batches.
- `raw`: a training that is given raw data runs preprocess first.

Imports go one way: the base modules, then `tokens`, then `preprocess` or `samples`, which don't
import each other, then `raw`. In `samples`, only `blend_table` and `splits` import neither torch
nor megatron; the command line may import them, and all else, before it starts a training.
"""
