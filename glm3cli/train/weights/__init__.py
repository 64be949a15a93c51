"""What a run trains: some of the weights, all of them, or an adapter in their place.

Begin with `selection`, which checks the names that --train-only and --freeze give, and excludes
from autograd what isn't trained, so that neither gradients nor optimizer state are made for it.
`adapter` finds out the rank and the targets of an adapter (LoRA), what its matrices begin with, and
what its adapter_config.json says.

`prepare` calls both for their checks, without torch; `setup`, `run` and preferences/ use the rest.
This room imports checkpoint/ and model/.
"""
