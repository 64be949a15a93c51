"""Tables of attributes of other libraries that are replaced, checked and reversible.

Megatron-core names CUDA in about forty places. Each row of a table says which attribute is
replaced, by what, and which upstream code needs it. An attribute that is gone after an upgrade is
an error, so that the change is noticed.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from glm3cli.errors import DeviceError


@dataclass(frozen=True)
class Redirect:
    """One attribute that is replaced.

    Attributes:
        owner: Dotted name of the module, or of the class in a module, that holds the attribute.
        attribute: The attribute's name.
        replace: Makes the new value from the original one.
        why: The upstream code that needs it, as a file of megatron-core 0.16.1.
    """

    owner: str
    attribute: str
    replace: Callable[[Any], Any]
    why: str

    def original(self) -> tuple[Any, Any]:
        """Returns the owner (a module or class) and the attribute's present value.

        Raises:
            DeviceError: This version of the library has no such attribute.
        """
        try:
            owner = _resolve(self.owner)
            return owner, getattr(owner, self.attribute)
        except (ModuleNotFoundError, AttributeError) as error:
            raise DeviceError(
                f"{self.owner}.{self.attribute} is gone, but {self.why} relied on it",
                "install the versions that `glm3 doctor` names",
            ) from error


def _resolve(name: str) -> Any:
    """Imports the module, or the class in a module, that a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), attribute)


class Redirects:
    """A table of redirects that is applied and undone as a whole."""

    def __init__(self, table: Sequence[Redirect]) -> None:
        self._table = table
        self._undo: list[tuple[Any, str, Any]] = []

    def apply(self) -> None:
        """Replaces all attributes of the table; if one doesn't exist, none stays replaced.

        Raises:
            DeviceError: An attribute of the table doesn't exist.
        """
        try:
            for row in self._table:
                owner, original = row.original()
                # As it stands there: a static method is still one when it is put back.
                kept = inspect.getattr_static(owner, row.attribute, original)
                self._undo.append((owner, row.attribute, kept))
                setattr(owner, row.attribute, row.replace(original))
        except DeviceError:
            self.undo()
            raise

    def undo(self) -> None:
        """Restores every original, in reverse order."""
        while self._undo:
            owner, attribute, original = self._undo.pop()
            setattr(owner, attribute, original)


def compile_nothing(_original: Any) -> Callable[..., Any]:
    """Replaces torch.compile by a function that returns what it is given, as decorator or not."""

    def give_back(function: Any = None, **_options: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    return give_back
