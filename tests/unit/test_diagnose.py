"""`glm3 doctor`: what it finds here, and on machines that are made up."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from glm3cli.cli import doctor
from glm3cli.device import diagnose as module
from glm3cli.device.diagnose import Finding, diagnose, installed, versions

ADVICE = "install torch 2.7.1 and torch_npu 2.7.1"


def findings() -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose()}


@pytest.fixture
def machine(monkeypatch):
    """Replaces versions of packages, the version of torch, cards, and CANN's environment."""
    real, glob = module.installed, Path.glob
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)

    def set_up(*, torch_version: str | None = None, cards: int = 0, **packages: str | None) -> None:
        given = {name.replace("_", "-"): found for name, found in packages.items()}
        monkeypatch.setattr(
            module,
            "installed",
            lambda name: (
                given[name.replace("_", "-")] if name.replace("_", "-") in given else real(name)
            ),
        )
        if torch_version is not None:
            monkeypatch.setattr(torch, "__version__", torch_version)
        devices = [Path(f"/dev/davinci{card}") for card in range(cards)]
        monkeypatch.setattr(
            Path,
            "glob",
            lambda path, pattern: devices if path == Path("/dev") else glob(path, pattern),
        )

    return set_up


def test_what_the_tests_run_on_is_found_to_fit(machine):
    machine()
    found = findings()
    assert found["torch"].found == torch.__version__
    for subject in ("torch", "megatron-core", "pydantic", "typer", "sentencepiece", "system"):
        assert found[subject].verdict == "ok", found[subject]
    assert found["npu"] == Finding("npu", "no NPU, no torch_npu", "absent")
    assert not {"CANN", "MindSpeed", "torch_npu"} & found.keys()


def test_every_fault_has_an_advice(machine):
    machine(torch_version="1.13.1", megatron_core=None, torch_npu="2.6.0", pyarrow=None)
    wrong = [finding for finding in diagnose() if finding.verdict == "wrong"]
    assert {finding.subject for finding in wrong} >= {
        "torch",
        "megatron-core",
        "pyarrow",
        "torch_npu",
        "CANN",
        "MindSpeed",
    }
    assert [finding.subject for finding in wrong if not finding.advice] == []


@pytest.mark.parametrize("version", ["0.15.3", "0.12.1", "0.161.0", None])
def test_another_megatron_core_is_wrong(version, machine):
    machine(megatron_core=version)
    assert findings()["megatron-core"] == Finding(
        "megatron-core", version or "missing", "wrong", "pip install 'megatron-core==0.16.1'"
    )


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("2.7.1", "ok"),
        ("2.7.1+cpu", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.9.0a0+git1234567", "ok"),
        ("2.7.0", "wrong"),
        ("2.6.0", "wrong"),
        ("2.14.0", "wrong"),
        ("3.0.0", "wrong"),
    ],
)
def test_the_range_of_torch_is_that_of_the_advice(version, verdict, machine):
    machine(torch_version=version)
    assert findings()["torch"].verdict == verdict


def test_a_missing_package_comes_with_its_install_command(machine):
    machine(sentencepiece=None)
    assert findings()["sentencepiece"] == Finding(
        "sentencepiece", "missing", "wrong", "pip install sentencepiece"
    )


@pytest.mark.parametrize(
    ("torch_npu", "torch_version", "found", "verdict"),
    [
        ("2.7.1", "2.7.1", "2.7.1", "ok"),
        ("2.7.1.post2", "2.7.1+cpu", "2.7.1.post2", "ok"),
        ("2.6.0", "2.7.1", "2.6.0 beside torch 2.7.1", "wrong"),
        ("2.7.1", "2.13.0+cpu", "2.7.1 beside torch 2.13.0+cpu", "wrong"),
        (None, "2.7.1", "missing", "wrong"),
    ],
)
def test_torch_npu_goes_with_the_same_torch(torch_npu, torch_version, found, verdict, machine):
    machine(torch_npu=torch_npu, torch_version=torch_version, cards=8)
    advice = ADVICE if verdict == "wrong" else ""
    assert findings()["torch_npu"] == Finding("torch_npu", found, verdict, advice)
    assert findings()["npu"].found == "8 card(s)"


def test_torch_npu_without_a_card_is_wrong(machine):
    machine(torch_npu="2.7.1", torch_version="2.7.1")
    found = findings()["npu"]
    assert (found.found, found.verdict) == ("no card", "wrong")
    assert "npu-smi info" in found.advice


def test_canns_environment_and_mindspeed_are_looked_for_beside_cards(machine, monkeypatch):
    machine(torch_npu="2.7.1", torch_version="2.7.1", cards=1, mindspeed=None)
    found = findings()
    assert found["CANN"].verdict == "wrong"
    assert found["CANN"].advice.startswith("source ")
    assert (found["MindSpeed"].found, found["MindSpeed"].verdict) == ("missing", "wrong")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/opt/cann")
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "mindspeed" or spec(name))
    found = findings()
    assert found["CANN"] == Finding("CANN", "/opt/cann", "ok")
    assert found["MindSpeed"] == Finding("MindSpeed", "from source", "ok")


def test_little_shared_memory_is_wrong(monkeypatch):
    usage = types.SimpleNamespace(free=2**26)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    found = findings()["shared memory"]
    assert (found.found, found.verdict) == ("0.1 GiB free", "wrong")
    assert "--shm-size" in found.advice


def test_gpus_are_counted_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    assert findings()["cuda"] == Finding("cuda", "2 x H100", "ok")


def test_versions_name_what_is_not_installed(machine):
    machine(torch_npu=None)
    assert versions()["torch_npu"] == "absent"
    assert versions()["megatron-core"].startswith("0.16.")
    assert installed("no-such-package-anywhere") is None


def test_looking_imports_no_vendor_package():
    diagnose()
    assert not {"torch_npu", "mindspeed"} & sys.modules.keys()


# --- the command ---


def invoke(*args: str) -> Any:
    app = typer.Typer()
    doctor.register(app)
    return CliRunner().invoke(app, args, env={**os.environ, "COLUMNS": "200"})


def test_doctor_is_content_with_a_machine_that_fits(machine):
    machine()
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "--device auto is cpu, with gloo" in result.stdout
    assert torch.__version__ in result.stdout


def test_doctor_ends_with_4_where_something_does_not_fit(machine):
    machine(megatron_core="0.12.1")
    result = invoke()
    assert result.exit_code == 4
    assert "pip install 'megatron-core==0.16.1'" in result.stdout


def test_doctors_json_has_every_finding(machine):
    machine(megatron_core="0.12.1")
    result = invoke("--json")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert report["device"] == "cpu"
    assert [Finding(**finding) for finding in report["findings"]] == diagnose()
