"""The report of `glm3 doctor` on this machine and on made-up ones."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from glm3cli.device.doctor.diagnose import diagnose
from glm3cli.device.doctor.machine import Finding, Machine
from tests.support.machines import (
    FakeMachine,
    install,
    laptop,
    server,
    with_environment,
    without,
    write,
)


def findings(machine: Machine | None = None) -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose(machine)}


def wrong(machine: Machine) -> set[str]:
    return {finding.subject for finding in diagnose(machine) if finding.verdict == "wrong"}


def test_what_the_tests_run_on_is_found_to_fit():
    found = findings()
    assert found["torch"].found == torch.__version__
    for subject in ("torch", "megatron-core", "pydantic", "typer", "sentencepiece", "system"):
        assert found[subject].verdict == "ok", found[subject]


def test_a_laptop_may_do_without_an_npu(tmp_path):
    machine = laptop(tmp_path)
    found = findings(machine)
    assert wrong(machine) == set()
    assert found["npu"] == Finding("npu", "no NPU, no torch_npu", "absent")
    assert not {"CANN", "MindSpeed", "torch_npu"} & found.keys()


def test_a_server_fits_as_a_whole(tmp_path):
    machine = server(tmp_path)
    assert wrong(machine) == set()
    assert {f.verdict for f in diagnose(machine) if f.subject != "cuda"} == {"ok"}


def test_every_fault_has_a_sentence_and_a_way_out(tmp_path):
    machine = without(server(tmp_path), "ASCEND_HOME_PATH")
    for package in ("torch", "torch_npu", "megatron-core", "mindspeed", "triton-ascend", "pyarrow"):
        install(machine, package, None)
    machine.file("/dev/hisi_hdc").unlink()
    machine = with_environment(machine, HCCL_CONNECT_TIMEOUT="5", LOCAL_WORLD_SIZE="16")
    assert wrong(machine) == {
        "torch",
        "megatron-core",
        "torch_npu",
        "CANN",
        "pyarrow",
        "npu",
        "local ranks",
        "HCCL_CONNECT_TIMEOUT",
    }
    bare = [f for f in diagnose(machine) if f.verdict == "wrong" and not (f.why and f.advice)]
    assert bare == []


def test_torchrun_is_told_to_leave_torch_npu_to_us(tmp_path):
    machine = without(server(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD")
    assert findings(machine)["torchrun"].advice == "export TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    # What the shell has exported counts, not what glm3 has set in its own process.
    write(machine.file("/proc/self/environ"), "HOME=/\0TORCH_DEVICE_BACKEND_AUTOLOAD=0\0")
    assert findings(machine)["torchrun"].verdict == "ok"


@pytest.mark.slow
def test_torchrun_fails_with_a_backend_that_does_not_import(tmp_path):
    record = install(replace(laptop(tmp_path), packages=[str(tmp_path)]), "backend", "1.0")
    write(record / "entry_points.txt", "[torch.backends]\nbackend = no_such_module:load\n")
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "-m", "glm3cli", "--version"]
    for setting, code in (("1", 1), ("0", 0)):
        variables = {"PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": setting}
        ended = subprocess.run(
            [sys.executable, *command], env=os.environ | variables, capture_output=True, text=True
        )
        assert ended.returncode == code, ended.stderr
        assert ("Failed to load the backend extension" in ended.stderr) == (code == 1)


def test_an_npu_without_its_software_is_told_all_that_is_missing(tmp_path):
    machine = without(server(tmp_path), "ASCEND_HOME_PATH")
    for package in ("torch_npu", "mindspeed", "triton-ascend"):
        install(machine, package, None)
    assert wrong(machine) == {"torch_npu", "CANN"}
    assert findings(machine)["MindSpeed"].verdict == "untried"


def test_torch_npu_without_a_card_is_wrong(tmp_path):
    machine = laptop(tmp_path)
    install(machine, "torch", "2.7.1")
    install(machine, "torch_npu", "2.7.1.post4")
    assert findings(machine)["npu"].found == "no card"
    assert {"npu", "CANN"} <= wrong(machine)


def test_canns_environment_alone_asks_for_the_rest(tmp_path):
    machine = with_environment(laptop(tmp_path), ASCEND_HOME_PATH=str(tmp_path))
    assert {"npu", "torch_npu"} <= wrong(machine)


def test_our_defaults_are_shown_beside_what_the_user_has_set(tmp_path):
    machine = with_environment(server(tmp_path), HCCL_CONNECT_TIMEOUT="300")
    found = findings(machine)
    assert found["HCCL_CONNECT_TIMEOUT"].found == "300"
    assert found["PYTORCH_NPU_ALLOC_CONF"].found == "expandable_segments:True (default of glm3)"
    default = findings(without(machine, "HCCL_CONNECT_TIMEOUT"))["HCCL_CONNECT_TIMEOUT"]
    assert default.found == "1200 (default of glm3)"


def test_a_missing_package_comes_with_its_install_command(tmp_path):
    machine = laptop(tmp_path)
    install(machine, "sentencepiece", None)
    found = findings(machine)["sentencepiece"]
    assert (found.found, found.verdict) == ("missing", "wrong")
    assert found.advice == "pip install sentencepiece"


class Small(FakeMachine):
    shared_memory = 2**26


def test_little_shared_memory_is_wrong(tmp_path):
    machine = Small(**vars(laptop(tmp_path)))
    found = findings(machine)["shared memory"]
    assert (found.found, found.verdict) == ("0.1 GiB free", "wrong")
    assert found.why == "/dev/shm has 64 MiB free, below 256 MiB"
    assert "--shm-size" in found.advice


def test_shared_memory_that_is_not_there_is_none(tmp_path):
    assert Machine(root=tmp_path).free(tmp_path / "dev/shm") == 0
    assert Machine().free(tmp_path) > 0


def test_gpus_are_counted_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    assert findings()["cuda"] == Finding("cuda", "2 x H100", "ok")
