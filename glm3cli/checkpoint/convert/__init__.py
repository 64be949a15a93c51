"""Conversions between layouts: `glm3 convert`, with its checks before, meanwhile and afterwards.

Begin with `convert`. Before it, `preflight` checks the request without torch, `target` the folder
to write, and `needs` the disk and the memory. `transfer` brings the tensors from the reader to the
writer, and `tensor_digests` computes their digests. `verify` reads the new folder back;
`verify_glm` lets transformers load a folder that was written for it. `check` compares a folder with
its manifest, `inspect` describes one, `adapter` converts a LoRA adapter, and `random_model` writes
random weights. Progress isn't printed here but reported to the caller (see `report`).

Only the command line, the demo and the tests import this folder.
"""
