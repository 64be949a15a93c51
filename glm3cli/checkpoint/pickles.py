"""Loads files that torch.save wrote, without running code that a stranger may have put in them.

Only torch's weights_only loader is used. Besides tensors and plain values it may build an
argparse.Namespace, numpy arrays (the random states of training checkpoints) and stand-ins for
Megatron's enums. Every other class is refused, and the message names it.
"""

import argparse
import contextlib
import enum
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from glm3cli.errors import CheckpointError, StoppedError

# Enums that the saved arguments and states of Megatron and the trainers made of it contain. They
# are replaced by stand-ins, so that no other program is imported. Their modules and names change
# from release to release; all are enums of these packages.
_FOREIGN = re.compile(
    r"(megatron|modellink|mindspeed|mindspeed_llm|transformer_engine)(\.\w+)*\.[A-Z]\w*|"
    r"signal\.Signals"
)


class ForeignEnum:
    """A stand-in for a member of an enum of a program that isn't installed here.

    Attributes:
        value: The member's value.
    """

    def __init__(self, value: object = None) -> None:
        self.value = value


def enum_member(kind: Any, name: Any) -> Any:
    """Returns a member of an enum; it stands for `getattr` in files that are loaded.

    Early releases of Python 3.11, such as the 3.11.2 of Debian 12, write a member as
    `getattr(kind, name)`, and all others as `kind(value)`. Whatever else getattr could reach is
    refused.

    Args:
        kind: An enum, or `ForeignEnum`, whose value is then the member's name.
        name: The name of the member.

    Raises:
        pickle.UnpicklingError: `kind` is no enum, or has no member of this name.
    """
    if kind is ForeignEnum:
        return ForeignEnum(name)
    if isinstance(kind, enum.EnumType) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError("Trying to call builtins.getattr")


def _allowed(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Returns the classes that a file may build, in the form that torch's `safe_globals` takes."""
    # What builds an array; numpy 1 and 2 have it in modules of different names.
    build: Any = numpy.empty(0).__reduce__()[0]
    names = [(build, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    numbers = [type(numpy.dtype(kind)) for kind in ("u1", "u4", "u8", "i4", "i8", "f4", "f8")]
    return [
        argparse.Namespace,
        *((ForeignEnum, name) for name in _foreign(path)),
        (enum_member, "builtins.getattr"),
        *names,
        numpy.ndarray,
        numpy.dtype,
        *numbers,
    ]


# What torch's loader may build is one list for all threads.
_LOADING = threading.Lock()


@contextlib.contextmanager
def _allowing_only(path: Path) -> Iterator[None]:
    """Lets torch's loader build what a file of weights may have, and nothing that others allow.

    Megatron-core allows its own enums once it is imported, whose values differ from release to
    release: stand-ins take any. Other threads wait until the block has ended.
    """
    with _LOADING:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals(_allowed(path))
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _foreign(path: Path) -> list[str]:
    """Returns the names of the other programs' classes that a file wants, for stand-ins."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file, of which the loader says so
        return []
    return [name for name in wanted if _FOREIGN.fullmatch(name)]


def load(path: Path) -> Any:
    """Loads a file that torch.save wrote, to the CPU.

    The tensors are mapped from the file. Files of the format before torch 1.6 can't be mapped and
    are read whole.

    Raises:
        CheckpointError: The file is damaged or wants a class that isn't allowed.
        StoppedError: The process received SIGTERM.
    """
    try:
        with _allowing_only(path):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except PermissionError:
        raise CheckpointError(f"{path} may not be read", "change its permissions") from None
    except StoppedError:
        raise
    except Exception as error:  # unpickling raises nearly anything
        raise _refusal(path, error) from None


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """Returns our error for one of torch's loader: a forbidden class, or a damaged file."""
    unsafe = re.search(r"(?:GLOBAL|Trying to \w+ (?:an? )?)\s*(\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and unsafe:
        return CheckpointError(
            f"{path} wants to run {unsafe.group(1)}, which weights don't need",
            "take the checkpoint from a source you trust, saved as tensors and plain values",
        )
    return CheckpointError(f"{path} is damaged or cut short", "fetch or save it again")
