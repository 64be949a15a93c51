"""Names of tensors without what programs put into them that save a model within another one."""

import re
from collections.abc import Sequence

# What torch.compile, FSDP and activation checkpointing put before the names of every module that
# they wrap, of which there may be several one within another.
_INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PEFT = "base_model.model."
# What stands before all names: of DistributedDataParallel and DeepSpeed, of Lightning, and of PEFT.
_OUTER = ("module.", "_forward_module.", PEFT)


def without_wrappers(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Takes out of names what stands for wrappers around the model or its modules.

    Args:
        names: All names of a checkpoint or an adapter.

    Returns:
        The names without it, by the names that were given, and what was taken out.
    """
    found = {f"{match}." for name in names for match in _INNER.findall(name)}
    left = {name: _INNER.sub("", name) for name in names}
    while left and (
        outer := next((o for o in _OUTER if all(n.startswith(o) for n in left.values())), "")
    ):
        left = {name: inner.removeprefix(outer) for name, inner in left.items()}
        found.add(outer)
    return left, sorted(found)
