"""Weights of 8 and 4 bits: how they are rounded, and products by them on a CPU."""

import pytest
import torch

from glm3cli.device.cpu_kernels import CpuKernels
from glm3cli.device.kernels import Kernels
from glm3cli.model.quantized import quantize


def weight(outputs: int = 48, inputs: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(inputs)
    rows = torch.randn(outputs, inputs, generator=generator)
    return rows * torch.linspace(0.1, 3, outputs).unsqueeze(1)


def test_8_bits_are_within_half_a_step_of_each_output() -> None:
    exact = weight()
    found = quantize(exact, 8)
    steps = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((found.weight() - exact).abs() <= steps * 0.5001).all()
    assert found.numbers.dtype == torch.int8


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (192, 64), (96, 32)])
def test_4_bits_are_within_half_a_step_of_each_group(inputs: int, group: int) -> None:
    exact = weight(inputs=inputs)
    found = quantize(exact, 4)
    parts = exact.view(48, -1, group)
    steps = (parts.amax(-1) - parts.amin(-1)).unsqueeze(-1) / 15
    assert ((found.weight().view_as(parts) - parts).abs() <= steps * 0.5001).all()
    assert found.scales.shape == (48, inputs // group)
    assert set(found.numbers.unique().tolist()) == set(range(16))


def test_inputs_that_make_no_groups_have_8_bits() -> None:
    assert quantize(weight(inputs=40), 4).bits == 8


def test_a_weight_of_zeros_stays_so() -> None:
    for bits in (8, 4):
        assert not quantize(torch.zeros(16, 64), bits).weight().any()


@pytest.mark.parametrize("number", [0.3, -70.0])
def test_numbers_that_are_all_the_same_have_a_step(number: float) -> None:
    """Some kernels count what zero stands for in steps, which fp16 must hold."""
    found = quantize(torch.full((16, 64), number), 4)
    assert found.zeros is not None
    assert (found.zeros / found.scales).abs().max() <= 2**8 + 8
    assert found.weight() == pytest.approx(torch.full((16, 64), number), rel=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outputs", [48, 41])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_weight(bits: int, outputs: int, dtype: torch.dtype) -> None:
    """The CPU's kernels multiply in bf16: inputs and scales have 8 bits, of random errors.

    41 outputs are none of the blocks that torch's kernel takes.
    """
    numbers, bias = quantize(weight(outputs), bits), torch.randn(outputs).to(dtype)
    for rows in (1, 5, 40):
        hidden = torch.randn(rows, 128).to(dtype)
        expected = hidden.float() @ numbers.weight().T + bias.float()
        for kernels in (Kernels(), CpuKernels()):
            found = kernels.linear_quantized(hidden, kernels.pack_quantized(numbers, dtype), bias)
            assert found.dtype == dtype
            assert (found.float() - expected).norm() < 2**-7 * expected.norm()
