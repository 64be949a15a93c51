"""The kernels in plain torch against the formulas that define them."""

from collections.abc import Callable
from itertools import pairwise

import psutil
import pytest
import torch
from torch import Tensor

from glm3cli.config.launch import KERNELS
from glm3cli.device import select

select("cpu").activate()

from glm3cli.device import functions  # noqa: E402
from glm3cli.device.choice import METHODS, StepwiseKernels, without  # noqa: E402
from glm3cli.device.cpu_kernels import CpuKernels  # noqa: E402
from glm3cli.device.kernels import Kernels  # noqa: E402
from glm3cli.model.rotary import angles_at, rotation_of_sequence  # noqa: E402
from glm3cli.train.progress.operators import Recorder, on_host  # noqa: E402

PLAIN = Kernels()


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_swiglu_and_its_gradient() -> None:
    torch.manual_seed(0)
    values = leaf(3, 2, 10)
    gate, up = values.detach().chunk(2, dim=-1)
    torch.testing.assert_close(PLAIN.swiglu(values).detach(), gate * gate.sigmoid() * up)
    assert torch.autograd.gradcheck(PLAIN.swiglu, values)


def test_a_cpus_norm_and_its_gradients() -> None:
    torch.manual_seed(0)
    hidden, weight = leaf(3, 2, 12), leaf(12)
    norm = CpuKernels().rms_norm
    torch.testing.assert_close(norm(hidden, weight, 0.1), PLAIN.rms_norm(hidden, weight, 0.1))
    assert torch.autograd.gradcheck(lambda *given: norm(*given, 0.1), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpus_norm_of_16_bits_is_computed_in_fp32(dtype: torch.dtype) -> None:
    """Numbers whose squares overflow in fp16; each result is rounded once, as torch's."""
    torch.manual_seed(0)
    given = [(400 * leaf(3, 2, 40)).detach().to(dtype), leaf(40).detach().to(dtype)]
    above, results = torch.randn(3, 2, 40).to(dtype), []
    for kernels in (CpuKernels(), PLAIN):
        hidden, weight = (one.clone().requires_grad_() for one in given)
        normed = kernels.rms_norm(hidden, weight, 1e-5)
        results.append((normed, *torch.autograd.grad(normed, (hidden, weight), above)))
    # Of 400 numbers, gradients are about 1 / 400.
    torch.testing.assert_close(*results, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_the_bits_are_the_same(dtype: torch.dtype) -> None:
    """A reference, whose passes have none, equals the policy that begins from its weights."""
    torch.manual_seed(0)
    kernels = CpuKernels()
    hidden, weight = torch.randn(512, 2, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    heads = hidden.view(512, 2, 4, 16)
    rotation = rotation_of_sequence(512, 16, 10_000.0, dtype, torch.device("cpu"))
    passes: list[Callable[[Tensor], Tensor]] = [
        lambda one: kernels.rms_norm(one, weight, 1e-5),
        kernels.swiglu,
        lambda one: kernels.rotate(one.view_as(heads), rotation),
        lambda one: kernels.attention(one.view_as(heads), heads, heads, 0.25, None),
        lambda one: kernels.cross_entropy(one, torch.zeros(512, 2, dtype=torch.long)),
    ]
    for number, compute in enumerate(passes):
        found = compute(hidden.clone().requires_grad_())
        assert found.requires_grad
        with torch.no_grad():
            assert torch.equal(compute(hidden), found), number


@pytest.mark.parametrize("kernels", [PLAIN, CpuKernels()], ids=["plain", "cpu"])
def test_rotation_and_its_gradient(kernels: Kernels) -> None:
    """Pair (2i, 2i + 1) of the first half turns by position / base^(4i / width)."""
    torch.manual_seed(0)
    heads = leaf(5, 2, 3, 8)
    rotation = rotation_of_sequence(5, 8, 10_000.0, torch.float64, torch.device("cpu"))
    found = kernels.rotate(heads, rotation).detach()
    assert torch.equal(found[..., 4:], heads[..., 4:])
    pairs = torch.view_as_complex(heads.detach()[..., :4].reshape(5, 2, 3, 2, 2))
    angles = torch.arange(5).double().unsqueeze(1) * torch.tensor([1.0, 10_000.0**-0.5]).double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    expected = torch.view_as_real(turned).reshape(5, 2, 3, 4)
    torch.testing.assert_close(found[..., :4], expected, rtol=0, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: kernels.rotate(x, rotation), heads)
    spread = torch.autograd.grad(kernels.rotate(heads, rotation).sum(), heads)
    expected_of_ones = torch.autograd.grad(PLAIN.rotate(heads, rotation).sum(), heads)
    torch.testing.assert_close(spread, expected_of_ones)


def test_inference_rotates_in_place_as_training_does() -> None:
    """In each type, at positions of their own, and without the values beside the keys."""
    torch.manual_seed(0)
    positions = torch.tensor([0, 7, 3])
    angles = angles_at(positions, 8, 10_000.0)
    for dtype in (torch.float32, torch.bfloat16):
        mixed = torch.randn(3, 2, 5, 8).to(dtype)
        expected = mixed.clone()
        rotation = PLAIN.rotation(angles[:, None, None], dtype)
        turned = PLAIN.rotate(mixed[:, :, :4].flatten(1, 2).unsqueeze(1), rotation)
        expected[:, :, :4] = turned.view(3, 2, 4, 8)
        with torch.no_grad():
            PLAIN.turn(mixed[:, :, :4], PLAIN.turns(angles, dtype))
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_weight_multiplies_as_it_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 12).to(dtype), torch.randn(7).to(dtype)
    kernels = CpuKernels()
    packed = kernels.pack(weight)
    for rows in (1, 3, 40):
        hidden = torch.randn(rows, 12).to(dtype)
        exact = hidden.double() @ weight.double().T + bias.double()
        found = kernels.linear(hidden, packed, bias)
        assert found.dtype == dtype
        # One rounding of the sum; fp32 sums in any order are closer.
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-7)


def test_what_is_compiled_for_a_number_of_tokens_isnt_kept_for_ever() -> None:
    kernels, process = CpuKernels(), psutil.Process()
    packed = kernels.pack(torch.randn(32, 48))
    sizes = []
    for numbers in (range(1, 300), range(300, 600)):
        for number in numbers:
            kernels.linear(torch.randn(number, 48), packed, None)
        sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < 90 * 2**20  # 43 MB; without a limit 170


def test_cross_entropy_and_its_gradient() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 7, (4, 3))
    ours, theirs = (torch.randn(4, 3, 7, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        theirs.copy_(ours)
        ours[0, 0, 0] = theirs[0, 0, 0] = 200.0  # whose others' probability is 0 in fp32
    weights = torch.randn(4, 3)
    losses = PLAIN.cross_entropy(ours, labels)
    expected = torch.nn.functional.cross_entropy(
        theirs.flatten(0, 1), labels.flatten(), reduction="none"
    ).view(4, 3)
    torch.testing.assert_close(losses, expected)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_cross_entropy_of_16_bit_logits_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 11, (5,))
    losses = PLAIN.cross_entropy(logits, labels)
    assert losses.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_packs_are_their_samples_alone_and_all_layers_share_a_mask() -> None:
    torch.manual_seed(0)
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (6, 6):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(3):
            heads = [torch.randn(6, 2, n, 8, requires_grad=True) for n in (4, 2, 2)]
            found = PLAIN.attention(*heads, 0.3, numbers)
            for row, starts in enumerate([(0, 3, 5, 6), (0, 1, 6)]):
                for start, end in pairwise(starts):
                    own = [tensor[start:end, row : row + 1] for tensor in heads]
                    alone = PLAIN.attention(*own, 0.3, None)
                    torch.testing.assert_close(found[start:end, row : row + 1], alone)
    assert len(kept) == 1


# The padding has the number 0: in front of the first row, behind the second one.
PACKS = torch.zeros(2, 90, dtype=torch.long)
PACKS[0, 5:30], PACKS[0, 30:80], PACKS[0, 80:] = 1, 2, 3
PACKS[1, :1], PACKS[1, 1:70] = 1, 2


@pytest.mark.parametrize("segment_ids", [None, PACKS], ids=["whole", "packed"])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 1), (2, 2)])
def test_attention_in_blocks_and_its_gradients(
    heads: int, groups: int, segment_ids: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 16, whose ends are neither samples' nor the sequence's, in views as layers have."""
    monkeypatch.setattr(functions.blocks, "_MOST_QUERIES", 16)
    torch.manual_seed(0)
    query, mixed = leaf(90, 2, heads, 8), leaf(90, 2, groups, 20)
    key, value = mixed.split([8, 12], dim=3)
    above = torch.randn(90, 2, heads, 12, dtype=torch.float64)
    given = query, key, value[..., :8], 0.3, segment_ids
    found, expected = functions.attention(*given), StepwiseKernels().attention(*given)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(one, (query, mixed), above[..., :8]) for one in (found, expected)
    ]
    torch.testing.assert_close(*gradients)
    # Bit for bit the same when it is computed again, as recomputation and resumed runs need it.
    again = torch.autograd.grad(functions.attention(*given), (query, mixed), above[..., :8])
    assert all(torch.equal(*pair) for pair in zip(again, gradients[0], strict=True))


@pytest.mark.parametrize(
    ("length", "is_packed", "dtype", "is_ours"),
    [
        (512, False, torch.float32, True),
        (512, True, torch.float32, True),
        (512, False, torch.bfloat16, False),
        (511, True, torch.float32, False),
        (768, False, torch.float32, False),
        (768, True, torch.float32, True),
    ],
)
def test_a_cpu_attends_in_blocks_where_that_is_faster(
    length: int, is_packed: bool, dtype: torch.dtype, is_ours: bool
) -> None:
    torch.manual_seed(0)
    numbers = torch.arange(length).div(300, rounding_mode="floor")[None] if is_packed else None
    heads = [torch.randn(length, 1, n, 8).to(dtype).requires_grad_() for n in (4, 2, 2)]
    context, expected = (
        kernels.attention(*heads, 0.3, numbers) for kernels in (CpuKernels(), PLAIN)
    )
    assert ("_Attention" in str(context.grad_fn)) is is_ours
    gradients = [torch.autograd.grad(one.square().sum(), heads) for one in (context, expected)]
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_what_is_left_out_is_computed_in_single_steps() -> None:
    """No operator fuses attention any more; its results and gradients stay."""
    query, keys = leaf(5, 2, 4, 8).float(), leaf(5, 2, 2, 8).float()
    segments = torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
    plain = without(CpuKernels(), KERNELS)
    assert set(KERNELS) == set(METHODS)
    for numbers in (None, segments):
        found, expected = (
            kernels.attention(query, keys, keys, 0.3, numbers) for kernels in (plain, CpuKernels())
        )
        torch.testing.assert_close(found, expected)
        assert "Flash" in str(expected.grad_fn.next_functions[0][0])
        assert "Flash" not in str(found.grad_fn.next_functions[0][0])
    assert plain.pack(keys) is keys


def test_what_has_no_kernel_for_a_device_runs_on_the_host() -> None:
    """A build of torch for CPUs has no kernel for an NPU, but composite ones, which call others."""
    aten = torch.ops.aten
    with Recorder() as recorder:
        torch.ones(2, 2).matmul(torch.ones(2, 2)).add_(1).t()
    assert {aten.mm.default, aten.add_.Tensor, aten.t.default} <= recorder.seen
    assert set(on_host(recorder.seen, torch.device("cuda"))) >= {"aten::mm"}
    assert "aten::t" not in on_host(recorder.seen, torch.device("cuda"))
    assert on_host(recorder.seen, torch.device("cpu")) == []
