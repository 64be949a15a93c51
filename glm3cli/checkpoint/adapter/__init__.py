"""LoRA adapters as PEFT saves them: read, merged into weights, and written for the other layout.

Begin with `pairs`: an `Adapter` is plain matrices by the weights that they change, and can be
merged into them. `reader` reads one for a model, and `writer` writes it with the module names of
either Hugging Face layout. `config` reads adapter_config.json, without torch, so that a wrong
adapter is reported at once. `fresh` makes the adapter that a training begins with, and `transfer`
copies an adapter into the model on the ranks and back.

`layouts` imports this folder, to read a base model with its adapter; `convert`, to merge adapters
into models and to convert them; training and inference, to compute with them. The command line
imports `config` alone.
"""
