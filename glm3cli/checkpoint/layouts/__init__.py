"""Readers and writers of the five layouts: chatglm, glm, legacy, mcore and dist (see `names`).

Begin with `opening`, which finds a folder's layout and returns its reader, and `writers`, which
opens the writer of a layout; `write_plan` has what all writers have in common.

- `hf` and `hf_writer`: Hugging Face files (chatglm and glm);
- `ranks` and `ranks_writer`: Megatron's per-rank files (legacy and mcore), with `arguments`, the
  command line that Megatron saves in them, and `archive`, which fills torch.save files;
- `dist` and `dist_writer`: megatron-core's distributed checkpoints, with `embedded`, which maps
  tensors in the middle of a file;
- `adapted`: any of these with LoRA adapters, as they are read from a run that trains one;
- `companions`: config, tokenizer and code beside the weights.

Other rooms import `opening` and `companions`; the rest is for this folder and `convert`.
"""
