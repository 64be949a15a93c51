"""The device layer: redirects, the order of activation, and the NPU's imports on stand-ins."""

import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from glm3cli.device import DEVICES, cpu, find, require_active, select
from glm3cli.device.npu import ENVIRONMENT, MINDSPEED_ARGUMENTS
from glm3cli.device.redirects import Redirect, Redirects
from glm3cli.device.versions import LOST
from glm3cli.errors import DeviceError

ROOT = Path(__file__).parents[2]


# --- redirects ---


@pytest.fixture
def library(monkeypatch):
    """A module with two functions and a class, to redirect."""
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


# --- the CPU ---


@pytest.mark.parametrize("redirect", cpu.REDIRECTS, ids=lambda r: f"{r.owner}.{r.attribute}")
def test_every_row_of_the_table_names_an_attribute_and_a_reason(redirect):
    redirect.original()
    assert ".py" in redirect.why or redirect.why.startswith(("models/", "everywhere"))


def test_no_row_of_the_table_comes_twice():
    assert len({(row.owner, row.attribute) for row in cpu.REDIRECTS}) == len(cpu.REDIRECTS)


@pytest.mark.parametrize("factory", ["tensor", "zeros", "ones", "empty"])
def test_what_asks_for_cuda_gets_the_cpu(factory):
    make = getattr(torch, factory)
    assert make([2], device="cuda").device.type == "cpu"
    assert make([2], device="cuda:1").device.type == "cpu"
    assert make([2], device=torch.cuda.current_device()).device.type == "cpu"
    assert make([2]).device.type == "cpu"
    assert make([2], device="meta").device.type == "meta"
    assert torch.empty_like(torch.ones(2), device="cuda").device.type == "cpu"


def test_tensors_say_the_types_that_megatron_compares():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).type(dtype=torch.int32).dtype == torch.int32


def test_what_has_no_meaning_on_a_cpu_does_nothing():
    tensor = torch.ones(1)
    assert tensor.cuda() is tensor
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        stream.synchronize()


def test_torch_compile_leaves_a_function_as_it_is():
    def double(x):
        return 2 * x

    assert torch.compile(double) is double
    assert torch.compile(mode="default")(double) is double


def test_the_random_state_of_cuda_is_the_cpus():
    before = torch.get_rng_state()
    try:
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3)
        from megatron.core.tensor_parallel.random import _set_cuda_rng_state

        _set_cuda_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)
    finally:
        torch.set_rng_state(before)


def test_the_cpu_is_one_device_for_every_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert select("cpu").torch_device() == torch.device("cpu")
    assert DEVICES["cuda"]().torch_device() == torch.device("cuda", 3)
    assert DEVICES["npu"].backend == "hccl"
    assert select("cpu").peak_memory() > 2**20


def test_ranks_on_the_cpu_share_what_the_machine_or_its_container_has(monkeypatch, tmp_path):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(cpu, "_MEMORY_LIMITS", limits)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert select("cpu").memory() == whole
    limits[0].write_text("max\n")
    limits[1].write_text(f"{2**62}\n")
    assert select("cpu").memory() == whole
    limits[0].write_text("4096\n")
    assert select("cpu").memory() == 4096
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert select("cpu").memory() == 1024


def test_auto_takes_an_npu_before_a_gpu_before_the_cpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find() == "cuda"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "torch_npu" or None)
    assert find() == "npu"


# --- the order of activation ---


def test_activating_twice_changes_nothing():
    zeros = torch.zeros
    select("cpu").activate()
    assert torch.zeros is zeros
    assert require_active() is select("cpu")


@pytest.mark.parametrize("other", ["cuda", "npu"])
def test_a_second_device_is_refused(other):
    with pytest.raises(DeviceError) as caught:
        select(other).activate()
    assert caught.value.message == f"--device {other}: this process already runs on cpu"
    assert require_active().name == "cpu"


# What the device layer needs of torch to be imported: a stand-in saves seconds a process, and takes
# the device type npu, which the real one knows with the real torch_npu only.
def run(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh process, with `folder` first on its path."""
    path = os.pathsep.join(str(item) for item in (folder, ROOT) if item)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "pretrain", "--tp", "2"],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def stand_in(folder: Path, **sources: str) -> Path:
    """Modules by dotted name (`__` for the dot) and source, as files in `folder`."""
    for name, source in sources.items():
        *packages, module = name.split("__")
        place = folder
        for package in packages:
            place = place / package
            place.mkdir(exist_ok=True)
            (place / "__init__.py").touch()
        if (place / module).is_dir():
            (place / module / "__init__.py").write_text(textwrap.dedent(source))
        else:
            (place / f"{module}.py").write_text(textwrap.dedent(source))
    return folder


def test_megatron_before_the_device_is_refused(tmp_path):
    stand_in(tmp_path, megatron__core="")
    done = run(
        """
        import torch
        before = torch.zeros
        import megatron.core
        from glm3cli.device import require_active, select
        from glm3cli.errors import DeviceError
        for attempt in (select("cpu").activate, require_active):
            try:
                attempt()
            except DeviceError as error:
                print(error.message)
        assert torch.zeros is before
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "megatron was imported before the device was activated",
        "no device is active",
    ]


# --- the NPU ---

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
    from glm3cli.device.npu import NpuDevice
    from glm3cli.errors import DeviceError
    from tests.support.machines import server
    machine = server(Path(os.environ["MACHINE"]))
    machine = replace(machine, environment={**machine.environment, **os.environ})
    devices._devices["npu"] = NpuDevice(machine)
"""
TORCH_NPU = """
    from types import SimpleNamespace
    import torch
    import recorder
    recorder.note("torch_npu")
    torch.utils.rename_privateuse1_backend("npu")
    class npu:
        available, devices = True, []
        is_available = classmethod(lambda cls: cls.available)
        set_compile_mode = classmethod(lambda cls, jit_compile: cls.devices.append(jit_compile))
        set_device = classmethod(lambda cls, device: cls.devices.append(str(device)))
        synchronize = classmethod(lambda cls: cls.devices.append("synchronized"))
        max_memory_allocated = classmethod(lambda cls: 7)
        get_device_name = classmethod(lambda cls: "Ascend910B3")
        get_device_properties = classmethod(lambda cls, device: SimpleNamespace(total_memory=9))
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
        said += [device.memory(), device.chip(), device.peak_tflops("bf16"), device.profiler()]
    except DeviceError as error:
        said = [error.message, error.hint]
    assert sys.argv is argv and sys.argv[1:] == ["pretrain", "--tp", "2"]
    print(json.dumps([recorder.log, said, dict(os.environ)]))
"""
)


@pytest.fixture
def ascend(tmp_path):
    """Stand-ins of torch_npu and MindSpeed that record when and with what argv they come."""
    return stand_in(
        tmp_path,
        recorder=RECORDER,
        torch_npu__profiler=PROFILER,
        torch_npu__contrib__transfer_to_npu="import recorder; recorder.note('transfer_to_npu')",
        torch_npu=TORCH_NPU,
        mindspeed__megatron_adaptor="""
            import logging, recorder, sys
            recorder.note('megatron_adaptor')
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
    ]
    # Operators are not compiled for each shape.
    assert said[:3] == ["npu", 7, ["npu:3", False, "synchronized"]]
    assert said[3:] == [9, "Ascend910B3", 354.0, ["host", "chip"]]
    assert {name: variables[name] for name in ENVIRONMENT} == ENVIRONMENT


def test_the_npus_environment_is_the_users_where_it_is_set(ascend):
    theirs = {"HCCL_CONNECT_TIMEOUT": "60", "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64"}
    _, _, variables = activate_npu(ascend, **theirs)
    assert {name: variables[name] for name in theirs} == theirs
    assert variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


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
    """Its stand-in is importable, but isn't installed on this machine."""
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
