"""Imports of large libraries: without what nobody uses, and without looking for garbage."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Megatron-core imports it wherever it is installed, for services that glm3 doesn't have. It takes
# half a second, and changes sys.stdout.
_UNUSED = "wandb"


@contextmanager
def large_imports() -> Iterator[None]:
    """Hastens imports: without optional packages, and without the garbage collector.

    What they make stays until the process ends, so that the garbage collector needn't look at it,
    neither now nor later. An optional package that megatron-core would import for nothing
    can't be found within the block, unless it is imported already.
    """
    collects, hides = gc.isenabled(), _UNUSED not in sys.modules
    gc.disable()
    if hides:
        sys.modules[_UNUSED] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules[_UNUSED]
        if collects:
            gc.freeze()
            gc.enable()
