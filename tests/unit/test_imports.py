"""Imports of large libraries: what they would import for nothing, and the garbage collector."""

import gc
import importlib
import sys

import pytest

from glm3cli.host.imports import large_imports


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A package of that name that can be imported."""
    (tmp_path / "wandb.py").write_text("FOUND = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_what_nobody_uses_is_found_after_the_block_alone(wandb):
    with large_imports(), pytest.raises(ImportError):
        importlib.import_module("wandb")
    assert importlib.import_module("wandb").FOUND


def test_what_was_imported_before_stays(wandb):
    before = importlib.import_module("wandb")
    with large_imports():
        assert importlib.import_module("wandb") is before
    assert sys.modules["wandb"] is before


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_left_as_it_was(collects):
    enabled = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with large_imports():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
    finally:
        (gc.enable if enabled else gc.disable)()
        gc.unfreeze()
