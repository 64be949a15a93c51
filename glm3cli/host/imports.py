"""Imports of large libraries: without what nobody uses, and without looking for garbage."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Megatron-core imports them wherever they are installed, for services that glm3 doesn't have. The
# first takes half a second, and changes sys.stdout; the second a tenth.
_UNUSED = ("wandb", "tensorboard")


@contextmanager
def large_imports() -> Iterator[None]:
    """Hastens imports: without optional packages, and without the garbage collector.

    What they make stays until the process ends, so that the garbage collector needn't look at it,
    neither now nor later. Optional packages that megatron-core would import for nothing
    can't be found within the block, unless they are imported already.
    """
    collects, hidden = gc.isenabled(), [name for name in _UNUSED if name not in sys.modules]
    gc.disable()
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collects:
            gc.freeze()
            gc.enable()
