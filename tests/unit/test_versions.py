"""The checks of versions that must fit together, on made-up machines."""

from dataclasses import replace
from pathlib import Path

import pytest

from glm3cli.device.doctor.machine import Finding
from glm3cli.device.doctor.pins import ASCEND, pip_install, release
from glm3cli.device.doctor.versions import (
    cann_version,
    check_versions,
    driver_version,
    require_versions,
)
from glm3cli.errors import DeviceError
from tests.support.machines import (
    FakeMachine,
    install,
    laptop,
    server,
    set_cann,
    with_environment,
    without,
    write,
)


def find(machine: FakeMachine, subject: str, npu: bool = True) -> Finding:
    return {finding.subject: finding for finding in check_versions(machine, npu)}[subject]


def sentence(machine: FakeMachine) -> str:
    """Returns the message with which a start on NPUs is refused."""
    with pytest.raises(DeviceError) as caught:
        require_versions(machine)
    assert caught.value.hint
    return caught.value.message


def test_what_mindspeeds_branch_goes_with_fits(tmp_path):
    machine = server(tmp_path)
    assert {finding.verdict for finding in check_versions(machine, npu=True)} == {"ok"}
    assert {finding.subject for finding in check_versions(machine, npu=True)} == {
        *ASCEND,
        *("triton", "requirements", "C++ compiler", "bisheng", "CANN's headers"),
        "transformer_engine",
    }
    require_versions(machine)


def test_a_laptop_needs_nothing_of_ascend(tmp_path):
    findings = check_versions(laptop(tmp_path), npu=False)
    assert [(f.subject, f.verdict) for f in findings] == [("torch", "ok"), ("megatron-core", "ok")]


def test_a_version_is_read_to_its_last_number():
    assert release("2.7.1.post4") == (2, 7, 1)
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("2.9.0a0+git1234567") == (2, 9, 0)
    assert release("8.1.RC1") == (8, 1)
    assert release("25.0.rc1.1") == (25, 0)
    assert release("unknown") == ()


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("2.7.1", "ok"),
        ("2.7.1+cpu", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.13.9", "ok"),
        ("2.9.0a0+git1234567", "ok"),
        ("2.7.0", "wrong"),
        ("2.6.0", "wrong"),
        ("2.14.0", "wrong"),
        ("3.0.0", "wrong"),
        (None, "wrong"),
    ],
)
def test_the_range_of_torch_is_that_of_the_advice(version, verdict, tmp_path):
    machine = laptop(tmp_path)
    install(machine, "torch", version)
    found = find(machine, "torch", npu=False)
    assert found.verdict == verdict
    assert found.advice == ("pip install 'torch>=2.7.1,<2.14'" if verdict == "wrong" else "")


@pytest.mark.parametrize("version", ["0.15.3", "0.12.1", "0.161.0", None])
def test_another_megatron_core_is_wrong(version, tmp_path):
    machine = laptop(tmp_path)
    install(machine, "megatron-core", version)
    found = find(machine, "megatron-core", npu=False)
    assert (found.found, found.verdict) == (version or "missing", "wrong")
    assert found.advice == "pip install megatron-core==0.16.1"


@pytest.mark.parametrize(
    ("torch", "torch_npu", "verdict", "why"),
    [
        ("2.7.1", "2.7.1.post4", "ok", ""),
        ("2.7.1", "2.6.0", "wrong", "torch_npu 2.6.0 is built for torch 2.6.0, here is torch"),
        ("2.13.0", "2.7.1.post4", "wrong", "is built for torch 2.7.1, here is torch 2.13.0"),
        (None, "2.7.1.post4", "ok", ""),  # torch's own line says it
        ("2.7.1", None, "wrong", "torch_npu is not installed"),
        ("2.13.0", "2.13.0", "untried", "goes with torch_npu 2.7.1.post4, here is 2.13.0"),
    ],
)
def test_torch_npu_goes_with_the_same_torch(torch, torch_npu, verdict, why, tmp_path):
    machine = server(tmp_path)
    install(machine, "torch", torch)
    install(machine, "torch_npu", torch_npu)
    found = find(machine, "torch_npu")
    assert (found.verdict, why in found.why) == (verdict, True), found
    assert bool(found.advice) == (verdict != "ok")


def test_a_torch_that_mindspeed_does_not_name_may_work(tmp_path):
    machine = server(tmp_path)
    install(machine, "torch", "2.9.0")
    install(machine, "torch_npu", "2.9.0.post2")
    assert find(machine, "torch").verdict == "untried"
    assert find(machine, "torch", npu=False).verdict == "ok"
    require_versions(machine)


@pytest.mark.parametrize(
    ("torch_npu", "cann", "verdict", "why"),
    [
        ("2.7.1.post4", "9.0.1", "ok", ""),
        ("2.7.1.post5", "9.0.0", "ok", ""),
        ("2.7.1.post4", "8.5.0", "wrong", "is built for CANN 9.0, here is CANN 8.5.0"),
        ("2.7.1.post8", "9.0.0", "wrong", "is built for CANN 9.1, here is CANN 9.0.0"),
        ("2.7.1.post11", "9.0.0", "wrong", "is built for CANN 9.1"),
        ("2.7.1", "8.2.RC1", "wrong", "is built for CANN 8.3, here is CANN 8.2.RC1"),
        ("2.7.1.post2", "8.5.0", "untried", "goes with CANN 9.0, here is 8.5.0"),
        ("2.7.1.post8", "9.1.0", "ok", ""),
    ],
)
def test_cann_is_not_older_than_torch_npu_wants(torch_npu, cann, verdict, why, tmp_path):
    machine = set_cann(server(tmp_path), cann)
    install(machine, "torch_npu", torch_npu)
    found = find(machine, "CANN")
    assert (found.found, found.verdict) == (cann, verdict)
    assert why in found.why
    assert bool(found.advice) == (verdict != "ok")


def test_canns_environment_is_named_where_it_is_not_set(tmp_path):
    machine = without(server(tmp_path), "ASCEND_HOME_PATH")
    found = find(machine, "CANN")
    assert (found.verdict, found.advice) == ("wrong", "source /usr/local/Ascend/cann/set_env.sh")
    assert "CANN's environment is not set" in sentence(machine)


def test_canns_set_env_is_found_where_a_user_has_put_it(tmp_path):
    machine = with_environment(laptop(tmp_path), HOME="/home/ann")
    assert find(machine, "CANN").advice.startswith("install CANN 9.0")
    write(machine.file("/home/ann/Ascend/ascend-toolkit/set_env.sh"), "")
    assert find(machine, "CANN").advice == "source /home/ann/Ascend/ascend-toolkit/set_env.sh"


def test_canns_folder_must_exist_and_tell_its_version(tmp_path):
    machine = with_environment(server(tmp_path), ASCEND_HOME_PATH=str(tmp_path / "gone"))
    assert "is no folder" in sentence(machine)
    (tmp_path / "gone").mkdir()
    found = find(machine, "CANN")
    assert (found.verdict, found.found) == ("untried", str(tmp_path / "gone"))


def test_the_version_of_an_older_cann_stands_in_version_cfg(tmp_path):
    home = tmp_path / "ascend-toolkit/latest"
    text = "# version: 1.0\nruntime_running_version=[7.6:8.0.0]\n"
    write(home / "version.cfg", text + "toolkit_running_version=[7.7.T20.0.B210:8.1.RC1]\n")
    machine = with_environment(laptop(tmp_path), ASCEND_TOOLKIT_HOME=str(home))
    assert cann_version(machine) == "8.1.RC1"
    write(home / "x86_64-linux/ascend_toolkit_install.info", "innerversion=V1\nversion=8.1.RC2\n")
    assert cann_version(machine) == "8.1.RC2"


@pytest.mark.parametrize(
    ("cann", "driver", "verdict"),
    [
        ("9.0.0", "25.0.rc1.1", "ok"),
        ("9.0.0", "26.1.0", "ok"),
        ("9.0.0", "24.1.rc3", "wrong"),
        ("9.1.0", "25.0.rc1", "wrong"),
        ("9.1.0", "25.2.0", "ok"),
        ("10.0.0", "25.0.0", "ok"),  # nothing is known
    ],
)
def test_the_driver_is_not_older_than_cann_wants(cann, driver, verdict, tmp_path):
    machine = set_cann(server(tmp_path), cann)
    write(machine.file("/usr/local/Ascend/driver/version.info"), f"Version={driver}\n")
    found = find(machine, "driver")
    assert (found.found, found.verdict) == (driver, verdict)
    if verdict == "wrong":
        assert f"driver {driver} is older than the 25." in sentence(machine)


def test_the_driver_is_found_where_it_was_installed(tmp_path):
    machine = server(tmp_path)
    write(machine.file("/etc/ascend_install.info"), "Driver_Install_Path_Param=/opt/Ascend\n")
    found = find(machine, "driver")
    assert (found.found, found.verdict) == ("unknown", "untried")
    assert "mount /usr/local/Ascend/driver" in found.advice
    write(machine.file("/opt/Ascend/driver/version.info"), "Version=25.3.0\n")
    assert driver_version(machine) == "25.3.0"


def test_python_is_the_one_that_all_parts_are_built_for(tmp_path):
    machine = replace(server(tmp_path), python="3.12.4")
    assert find(machine, "Python").verdict == "untried"
    assert "goes with Python 3.11, here is 3.12.4" in find(machine, "Python").why


@pytest.mark.parametrize(
    ("version", "verdict", "why"),
    [
        ("0.16.0", "ok", ""),
        ("0.12.1", "wrong", "MindSpeed 0.12.1 is not for megatron-core 0.16"),
        ("0.15.3", "wrong", "MindSpeed 0.15.3 is not for megatron-core 0.16"),
        ("0.0.1.dev1", "wrong", "PyPI's placeholder"),
        (None, "untried", "MindSpeed is not installed"),
    ],
)
def test_mindspeeds_version_tells_its_branch(version, verdict, why, tmp_path):
    machine = server(tmp_path)
    install(machine, "mindspeed", version)
    found = find(machine, "MindSpeed")
    assert (found.verdict, why in found.why) == (verdict, True), found
    assert ("git clone -b core_r0.16.0" in found.advice) == (verdict != "ok")


def clone(folder: Path, branch: str, version: str) -> Path:
    """Makes a checkout of MindSpeed's source."""
    write(folder / ".git/HEAD", f"ref: refs/heads/{branch}\n")
    write(folder / "setup.py", f"__version__ = '{version}'\n")
    write(folder / "mindspeed/__init__.py", "")
    return folder


@pytest.mark.parametrize(
    ("branch", "verdict"), [("core_r0.16.0", "ok"), ("master", "wrong"), ("core_r0.17.0", "wrong")]
)
def test_a_branch_changed_after_mindspeeds_install_is_seen(branch, verdict, tmp_path):
    source, machine = clone(tmp_path / "MindSpeed", branch, "0.12.1"), server(tmp_path)
    install(machine, "mindspeed", "0.16.0", url=f"file://{source}", dir_info={"editable": True})
    found = find(machine, "MindSpeed")
    assert (found.found, found.verdict) == (f"0.16.0 ({branch})", verdict)


def test_a_commit_that_is_checked_out_goes_by_mindspeeds_version(tmp_path):
    source, machine = clone(tmp_path / "MindSpeed", "x", "0.16.0"), server(tmp_path)
    write(source / ".git/HEAD", "e4772499f7eb9fa9a68919dd1eaddef00e915b2d\n")
    install(machine, "mindspeed", "0.16.0", url=f"file://{source}", dir_info={"editable": True})
    assert find(machine, "MindSpeed") == Finding("MindSpeed", "0.16.0")


def test_mindspeed_installed_from_git_has_its_branch_noted_down(tmp_path):
    machine = server(tmp_path)
    origin = {"url": "https://x/MindSpeed.git", "vcs_info": {"requested_revision": "master"}}
    install(machine, "mindspeed", "0.12.1", **origin)
    assert find(machine, "MindSpeed").found == "0.12.1 (master)"
    assert find(machine, "MindSpeed").verdict == "wrong"


def test_mindspeeds_source_on_the_path_is_enough(tmp_path):
    machine = server(tmp_path)
    install(machine, "mindspeed", None)
    source = clone(tmp_path / "MindSpeed", "core_r0.16.0", "0.16.0")
    machine = replace(machine, packages=[*machine.packages, str(source)])
    assert find(machine, "MindSpeed") == Finding("MindSpeed", "0.16.0 (core_r0.16.0)")


@pytest.mark.parametrize(
    ("package", "version", "why", "advice"),
    [
        ("triton-ascend", None, "triton-ascend, which MindSpeed imports", "pip install triton-asc"),
        ("triton", "3.4.0", "triton 3.4.0 has overwritten", "pip uninstall -y triton triton-asc"),
        ("transformer-engine", "2.9.0", "transformer_engine 2.9.0 is in the way", "pip uninstall"),
        ("einops", None, "MindSpeed imports einops, which isn't installed", "pip install einops"),
        ("pybind11", None, "MindSpeed imports pybind11", "pip install pybind11"),
    ],
)
def test_packages_that_mindspeed_needs_or_stumbles_on(package, version, why, advice, tmp_path):
    machine = server(tmp_path)
    install(machine, package, version)
    with pytest.raises(DeviceError) as caught:
        require_versions(machine)
    assert why in caught.value.message
    assert caught.value.hint.startswith(advice)
    install(machine, "mindspeed", None)
    require_versions(machine)  # nothing else wants them


@pytest.mark.parametrize(
    ("file", "why", "advice"),
    [
        ("bin/bisheng", "bisheng, which triton-ascend looks for, is not", "set_env.sh"),
        ("bin/g++", "neither clang++ nor g++", "apt install g++"),
        ("root/usr/local/Ascend/cann/include/acl/acl.h", "no acl/acl.h", "CANN's Toolkit"),
    ],
)
def test_what_triton_compiles_with(file, why, advice, tmp_path):
    machine = server(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DeviceError) as caught:
        require_versions(machine)
    assert why in caught.value.message
    assert advice in caught.value.hint


@pytest.mark.parametrize(
    ("architecture", "command"),
    [
        ("aarch64", "pip install torch==2.7.1 torch-npu==2.7.1.post4"),
        (
            "x86_64",
            "pip install torch==2.7.1+cpu torch-npu==2.7.1.post4 --extra-index-url "
            "https://download.pytorch.org/whl/cpu",
        ),
    ],
)
def test_the_advice_is_for_the_machines_architecture(architecture, command, tmp_path):
    machine = replace(server(tmp_path), architecture=architecture)
    assert pip_install(machine) == command
    install(machine, "torch_npu", None)
    assert find(machine, "torch_npu").advice == command


def test_newer_ones_that_fit_are_known_as_well(tmp_path):
    machine = set_cann(server(tmp_path), "9.1.0")
    install(machine, "torch", "2.10.0+cpu")
    install(machine, "torch_npu", "2.10.0.post4")
    assert {find(machine, name).verdict for name in ("torch", "torch_npu", "CANN")} == {"ok"}
    assert find(set_cann(machine, "9.0.0"), "CANN").verdict == "wrong"


def test_a_start_names_every_fault_at_once(tmp_path):
    machine = without(server(tmp_path), "ASCEND_HOME_PATH")
    install(machine, "torch_npu", "2.6.0")
    install(machine, "mindspeed", "0.12.1")
    with pytest.raises(DeviceError) as caught:
        require_versions(machine)
    assert caught.value.message.count(";") == caught.value.hint.count(";") == 2
    for text in ("torch_npu 2.6.0", "CANN's environment", "MindSpeed 0.12.1"):
        assert text in caught.value.message
