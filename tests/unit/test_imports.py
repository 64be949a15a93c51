"""Imports of large libraries: what they would import for nothing, and the garbage collector."""

import gc
import importlib
import sys

import pytest

from glm3cli.host.imports import large_imports


@pytest.fixture(params=["wandb", "tensorboard"])
def unused(request, monkeypatch, tmp_path):
    """The name of a package that can be imported."""
    (tmp_path / f"{request.param}.py").write_text("FOUND = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    return request.param


def test_what_nobody_uses_is_found_after_the_block_alone(unused):
    with large_imports(), pytest.raises(ImportError):
        importlib.import_module(unused)
    assert importlib.import_module(unused).FOUND


def test_what_was_imported_before_stays(unused):
    before = importlib.import_module(unused)
    with large_imports():
        assert importlib.import_module(unused) is before
    assert sys.modules[unused] is before


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
