"""The device layer: which device is chosen, the CPU's redirects, and the order of activation."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from glm3cli.device import DEVICES, cpu, cpu_kernels, find, require_active, select
from glm3cli.errors import DeviceError
from glm3cli.host import memory
from tests.support.stand_ins import run, stand_in

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


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    ("rows", "dtype", "left_out", "times"),
    [
        (6, torch.float32, (), 2),
        (0, torch.float32, (), 0),
        (6, torch.bfloat16, (), 0),
        (6, torch.float32, ("linear",), 0),
    ],
)
def test_onednn_multiplies_in_training_where_mkl_is_slow(
    monkeypatch, trains, rows, dtype, left_out, times
):
    """Outputs and the inputs' gradients in fp32; a weight's is added where the others are."""
    from megatron.core.tensor_parallel import layers

    operator, calls = cpu_kernels._ONEDNN._linear_pointwise, []
    onednn = SimpleNamespace(_linear_pointwise=lambda *args: calls.append(1) or operator(*args))
    monkeypatch.setattr(cpu_kernels, "_multiplies_slowly", lambda: True)
    monkeypatch.setattr(cpu_kernels, "_ONEDNN", onednn)
    monkeypatch.setattr(require_active(), "without_kernels", left_out)
    for row in cpu_kernels.PRODUCTS:
        owner, present = row.original()
        original = getattr(present, "__wrapped__", present)
        monkeypatch.setattr(owner, row.attribute, row.replace(original))
    torch.manual_seed(0)
    shapes = (rows, 2, 12), (7, 12), (7,), (rows, 2, 7)
    hidden, weight, bias, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    exact = hidden.double() @ weight.double().T + bias.double()
    hidden.requires_grad_()
    weight.requires_grad_(trains).main_grad = torch.ones(7, 12)
    if trains:
        function = layers.LinearWithGradAccumulationAndAsyncCommunication
        found = function.apply(hidden, weight, bias, True, False, False, None, 0, None)
    else:
        found = layers.LinearWithFrozenWeight.apply(hidden, weight, bias, False, None)
    assert not found._is_view()  # which megatron-core's loss changes in place
    found.backward(grad)
    assert len(calls) == times
    close = partial(torch.testing.assert_close, check_dtype=False, rtol=2**-7, atol=2**-6)
    if dtype == torch.float32:
        close = partial(close, rtol=1e-5, atol=1e-5)
    close(found.double(), exact)
    close(hidden.grad.double(), grad.double() @ weight.detach().double())
    added = torch.einsum("nbo,nbi->oi", grad.double(), hidden.detach().double())
    close(weight.main_grad.double(), 1 + added * trains)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_mkl_multiplies_in_training_on_intels_processors(monkeypatch, tmp_path, vendor):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu_kernels, "_PROCESSOR", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert cpu_kernels._multiplies_slowly() == (has_both and vendor != "GenuineIntel")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not cpu_kernels._multiplies_slowly()


def test_training_keeps_fewer_compiled_products_unless_a_user_has_chosen(monkeypatch):
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: object())  # another libc, left as it is
    names = ["LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    for name in names:
        monkeypatch.setenv(name, "256")
    device = select("cpu")
    monkeypatch.setattr(device, "_ours", {names[0]})
    device.tune_memory_for_training()
    assert [os.environ[name] for name in names] == ["32", "256"]


def test_the_cpu_is_one_device_for_every_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert select("cpu").torch_device() == torch.device("cpu")
    assert DEVICES["cuda"]().torch_device() == torch.device("cuda", 3)
    assert DEVICES["npu"].backend == "hccl"
    assert select("cpu").peak_memory() > 2**20


def test_ranks_on_the_cpu_share_what_the_machine_or_its_container_has(monkeypatch, tmp_path):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.stat").write_text("anon 7\n")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for told, expected in (("max", whole), (str(2**62), whole), ("4096", 4096)):
        (tmp_path / "memory.max").write_text(f"{told}\n")
        assert select("cpu").memory() == expected
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
