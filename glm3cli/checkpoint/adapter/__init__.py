"""LoRA adapters as PEFT saves them: read, merged into weights, and written for the other layout.

Begin with `reader`: `open_adapter` reads an adapter for a model, and `Adapter.merge` adds it to a
weight. `config` reads adapter_config.json, without torch, so that a wrong adapter is reported at
once. `writer` writes an adapter with the module names of either Hugging Face layout.

`convert` imports this folder, to merge adapters into models and to convert adapters. The command
line imports `config` alone.
"""
