"""The imports of the NPU's packages, their order, and the errors where one fails; on stand-ins."""

import json
from pathlib import Path

import pytest

from glm3cli.device.doctor.environment import ENVIRONMENT
from glm3cli.device.doctor.mindspeed import LOST
from glm3cli.device.npu.device import MINDSPEED_ARGUMENTS, WITHOUT_ADAMW
from tests.support.stand_ins import run, stand_in

RECORDER = """
    import json, os, sys
    log = []
    def note(name):
        log.append([name, sys.argv[1:], "megatron" in sys.modules])
"""
# The NPU of a machine that is made up.
MADE_UP = """
    import json, os, sys
    from pathlib import Path
    import recorder
    from dataclasses import replace
    from glm3cli import device as devices
    from glm3cli.device import require_active, select
    from glm3cli.device.npu.device import NpuDevice
    from glm3cli.errors import DeviceError
    from tests.support.machines import server
    machine = server(Path(os.environ["MACHINE"]))
    programs = {"PATH": machine.environment["PATH"]}
    machine = replace(machine, environment={**machine.environment, **os.environ, **programs})
    devices._devices["npu"] = NpuDevice(machine)
"""
TORCH_NPU = """
    import torch
    import recorder
    recorder.note("torch_npu")
    log = recorder.log
    torch.utils.rename_privateuse1_backend("npu")
    class npu:
        available, devices = True, []
        is_available = classmethod(lambda cls: cls.available)
        set_compile_mode = classmethod(lambda cls, jit_compile: cls.devices.append(jit_compile))
        set_device = classmethod(lambda cls, device: cls.devices.append(str(device)))
        current_device = classmethod(lambda cls: log.append("opened " + str(cls.devices[:1])))
        mem_get_info = classmethod(lambda cls, device: (7, 9))
        memory_reserved = classmethod(lambda cls, device: 1)
        synchronize = classmethod(lambda cls: cls.devices.append("synchronized"))
        max_memory_allocated = classmethod(lambda cls: 7)
        get_device_name = classmethod(lambda cls: "Ascend910B3")
"""
PROFILER = """
    class ProfilerActivity:
        CPU, NPU = "host", "chip"
    def profile(activities):
        return activities
"""
ACTIVATE = (
    MADE_UP
    + """
    argv = sys.argv
    try:
        select("npu").activate()
        device = require_active()
        device.synchronize()
        said = [device.name, device.peak_memory(), sys.modules["torch_npu"].npu.devices]
        hccl = device.memory() - device.memory_left(3)
        said += [device.memory(), hccl, device.chip()]
        said += [device.peak_tflops("bf16"), device.profiler()]
    except DeviceError as error:
        said = [error.message, error.hint]
    assert sys.argv is argv and sys.argv[1:] == ["pretrain", "--tp", "2"]
    print(json.dumps([recorder.log, said, dict(os.environ)]))
"""
)


@pytest.fixture
def ascend(tmp_path):
    """Stand-ins for torch_npu and MindSpeed that record when they are imported, and the argv."""
    return stand_in(
        tmp_path,
        recorder=RECORDER,
        torch_npu__profiler=PROFILER,
        torch_npu__contrib__transfer_to_npu="import recorder; recorder.note('transfer_to_npu')",
        torch_npu=TORCH_NPU,
        mindspeed__megatron_adaptor="""
            import logging, recorder, sys, torch_npu
            recorder.note('megatron_adaptor')
            torch_npu.npu.current_device()
            logging.basicConfig(stream=sys.stdout, force=True)
        """,
    )


def activate_npu(folder: Path, **environment: str) -> tuple[list, list, dict]:
    done = run(ACTIVATE, folder, MACHINE=str(folder), **environment)
    assert done.returncode == 0, done.stderr
    log, said, variables = json.loads(done.stdout)
    return log, said, variables


def test_the_npus_packages_come_in_order_and_do_not_see_our_arguments(ascend):
    log, said, variables = activate_npu(ascend, LOCAL_RANK="3")
    theirs = list(MINDSPEED_ARGUMENTS)
    assert log == [
        ["torch_npu", theirs, False],
        ["transfer_to_npu", theirs, False],
        ["megatron_adaptor", theirs, False],
        # CANN opens the NPU that is current when something first touches it.
        "opened ['npu:3']",
    ]
    # Operators are not compiled for each shape.
    assert said[:3] == ["npu", 7, ["npu:3", False, "synchronized"]]
    # What is free and what it holds; and of each group a buffer to send and one to receive.
    assert said[3:5] == [8, 3 * 2 * 200 * 2**20]
    assert said[5:] == ["Ascend910B3", 354.0, ["host", "chip"]]
    assert {name: variables[name] for name in ENVIRONMENT} == ENVIRONMENT


def test_torchs_adamw_stands_in_for_mindspeeds(ascend):
    code = """
    select("npu").activate(["adamw"])
    print(json.dumps(recorder.log))
    """
    done = run(MADE_UP + code, ascend, MACHINE=str(ascend))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[2] == ["megatron_adaptor", list(WITHOUT_ADAMW), False]


def test_the_npus_environment_is_the_users_where_it_is_set(ascend):
    theirs = {
        "HCCL_CONNECT_TIMEOUT": "60",
        "HCCL_BUFFSIZE": "120",
        "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64",
    }
    _, said, variables = activate_npu(ascend, **theirs)
    assert {name: variables[name] for name in theirs} == theirs
    assert variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert said[4] == 3 * 2 * 120 * 2**20


@pytest.mark.slow
def test_it_is_told_who_has_set_what(ascend):
    theirs = {"HCCL_CONNECT_TIMEOUT": "600", "HCCL_IF_IP": "10.0.0.1", "OMP_NUM_THREADS": "4"}
    settings = """
    select("npu").activate()
    print(json.dumps(select("npu").settings()))
    """
    done = run(MADE_UP + settings, ascend, MACHINE=str(ascend), **theirs)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for name, value in theirs.items():
        assert told[name] == f"{value} (given)"
    assert told["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True (default of glm3)"
    assert told["CUDA_DEVICE_MAX_CONNECTIONS"] == "1 (default of glm3)"
    assert "PATH" not in told


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("torch_npu", "raise ImportError('libhccl.so: cannot open shared object file')"),
        ("torch_npu.contrib.transfer_to_npu", "raise ImportError('libhccl.so: cannot open')"),
        ("mindspeed.megatron_adaptor", "import libhccl_so"),
    ],
)
def test_a_package_that_does_not_import_is_named_with_the_way_out(module, source, ascend):
    stand_in(ascend, **{module.replace(".", "__"): source})
    _, (message, hint), _ = activate_npu(ascend)
    assert message.startswith(f"--device npu: import {module} failed: ")
    assert "libhccl" in message
    assert "glm3 doctor" in hint


def test_an_npu_that_is_not_there_is_told(ascend):
    stand_in(
        ascend,
        torch_npu=TORCH_NPU.replace("available, devices = True", "available, devices = False"),
    )
    _, (message, hint), _ = activate_npu(ascend)
    assert message == "--device npu: torch_npu finds no NPU"
    assert "npu-smi" in hint


def test_what_cannot_work_is_told_before_anything_is_imported(ascend):
    log, (message, hint), _ = activate_npu(ascend, ASCEND_HOME_PATH="")
    assert log == []
    assert message == "--device npu: CANN's environment is not set"
    assert "set_env.sh" in hint


def test_more_ranks_than_npus_are_refused(ascend):
    log, (message, _), _ = activate_npu(ascend, LOCAL_WORLD_SIZE="9")
    assert log == []
    assert message.startswith("--device npu: ")
    assert "9" in message


def test_without_mindspeed_it_is_said_what_is_lost(ascend):
    """MindSpeed's stand-in can be imported, but isn't installed on this machine."""
    code = """
    from tests.support.machines import install
    install(machine, "mindspeed", None)
    select("npu").activate()
    print(json.dumps([[name for name, *_ in recorder.log], list(select("npu").remarks)]))
    """
    done = run(MADE_UP + code, ascend, MACHINE=str(ascend))
    assert done.returncode == 0, done.stderr
    imported, remarks = json.loads(done.stdout)
    assert imported == ["torch_npu", "transfer_to_npu"]
    assert remarks == [LOST]


@pytest.mark.slow
def test_mindspeed_does_not_log_among_the_results(ascend):
    code = """
    import logging
    select("npu").activate()
    logging.getLogger("megatron.core").warning("anything")
    """
    done = run(MADE_UP + code, ascend, MACHINE=str(ascend))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "anything" in done.stderr


def test_deterministic_reaches_the_network_too(ascend):
    code = """
    import torch
    select("npu").activate()
    select("npu").make_deterministic()
    print(json.dumps([torch.are_deterministic_algorithms_enabled(), dict(os.environ)]))
    """
    done = run(MADE_UP + code, ascend, MACHINE=str(ascend))
    assert done.returncode == 0, done.stderr
    enabled, variables = json.loads(done.stdout)
    assert enabled
    assert (variables["HCCL_DETERMINISTIC"], variables["CLOSE_MATMUL_K_SHIFT"]) == ("true", "1")
