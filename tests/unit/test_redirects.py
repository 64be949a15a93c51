"""Tables of replaced attributes are checked, and undone as a whole."""

import sys
import types

import pytest

from glm3cli.device.redirects import Redirect, Redirects
from glm3cli.errors import DeviceError


@pytest.fixture
def library(monkeypatch):
    """Makes a module with two functions and a class whose attributes can be redirected."""
    module = types.ModuleType("made_up_library")

    class Box:
        size = 3

    module.Box, module.one, module.two = Box, lambda: 1, lambda: 2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def row(attribute: str, owner: str = "made_up_library", value: int = 10) -> Redirect:
    return Redirect(owner, attribute, lambda original: lambda: original() + value, "made_up.py:1")


def test_apply_replaces_and_undo_restores(library):
    originals = library.one, library.two
    redirects = Redirects([row("one"), row("two", value=20)])
    redirects.apply()
    assert (library.one(), library.two()) == (11, 22)
    redirects.undo()
    assert (library.one, library.two) == originals


def test_undo_takes_back_several_rows_of_one_attribute(library):
    original = library.one
    redirects = Redirects([row("one"), row("one", value=100)])
    redirects.apply()
    assert library.one() == 111
    redirects.undo()
    assert library.one is original


def test_a_class_of_a_module_can_be_the_owner(library):
    redirects = Redirects([Redirect("made_up_library.Box", "size", lambda size: size + 1, "why")])
    redirects.apply()
    assert library.Box.size == 4
    redirects.undo()
    assert library.Box.size == 3


def test_a_missing_attribute_is_an_error_and_nothing_stays_applied(library):
    original = library.one
    redirects = Redirects([row("one"), row("three")])
    with pytest.raises(DeviceError) as caught:
        redirects.apply()
    assert caught.value.message == "made_up_library.three is gone, but made_up.py:1 relied on it"
    assert "glm3 doctor" in caught.value.hint
    assert library.one is original


@pytest.mark.parametrize("owner", ["made_up_library.Gone", "made_up_library.gone.Box"])
def test_a_missing_owner_is_an_error_and_nothing_stays_applied(owner, library):
    original = library.one
    redirects = Redirects([row("one"), row("size", owner=owner)])
    with pytest.raises(DeviceError, match=rf"{owner}\.size is gone"):
        redirects.apply()
    assert library.one is original
