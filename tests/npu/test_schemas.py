"""Every argument that we pass exists in the torch_npu that runs on cards.

Its wheel can't be imported beside another torch: the schemas are read from its library's text.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import glm3cli
from glm3cli.device.doctor.machine import Machine
from glm3cli.device.doctor.pins import ALSO, ASCEND, pip_install
from glm3cli.device.npu.operators import SCHEMAS
from tests.npu.test_operators import CASES, INFERENCE, infer, run
from tests.support.mc2 import block
from tests.support.npu.operators import KERNELS
from tests.support.npu.wheel import schemas, unpacked, version_here
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", params=[ASCEND, ALSO], ids=lambda pins: pins["torch_npu"])
def wheel_of_cards(wheels: Path, request: pytest.FixtureRequest) -> Path:
    return unpacked(request.param["torch_npu"], wheels)


@pytest.fixture(scope="module")
def on_cards(wheel_of_cards: Path) -> dict[str, str]:
    return schemas(wheel_of_cards)


def arguments(schema: str) -> dict[str, str]:
    """Returns the names and types of a schema's arguments, in their order."""
    inside = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    parts = re.split(r", (?![^\[]*\])", inside)
    named = [part.split("=")[0].rsplit(" ", 1) for part in parts if part != "*"]
    return {name: kind for kind, name in named}


# For each operator and call, the number of positional arguments, and the names of all.
Calls = dict[str, list[tuple[int, list[str]]]]


def recorded(sending: bool) -> Calls:
    """Returns the calls of one rank alone, or of one that communicates while it multiplies."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: Calls = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args, kwargs=None):
            if function.namespace == "npu":
                name = function.overloadpacket.__name__
                defaults = [a.default_value for a in function._schema.arguments]
                names = [a.name for a in function._schema.arguments]
                given = [
                    name
                    for name, value, default in zip(names, args, defaults, strict=False)
                    if value is not default
                ]
                calls.setdefault(name, []).append((len(args), [*given, *(kwargs or {})]))
            return function(*args, **(kwargs or {}))

    with Recorder():
        if sending:
            block(mc2=True)
            return calls
        for name in CASES:
            run(name, torch.bfloat16)
        for name in INFERENCE:
            infer(name, torch.bfloat16)
    return calls


@pytest.fixture(scope="module")
def calls(npu_ranks: RankPool) -> Calls:
    """Returns the calls of all operators."""
    alone, sending = npu_ranks.run(1, recorded, False), npu_ranks.run(2, recorded, True)
    return {**alone[0], **sending[0]}


def test_our_calls_fit_the_schemas_of_cards(calls: Calls, on_cards: dict[str, str]) -> None:
    assert calls.keys() == KERNELS.keys()
    for name, ways in calls.items():
        known = list(arguments(on_cards[name]))
        for num_positional, names in ways:
            assert set(names) <= set(known), name
            # By position, an argument is the same on both.
            assert num_positional <= len(known), name


def test_the_emulated_schemas_begin_as_those_of_cards(
    calls: Calls, on_cards: dict[str, str], wheels: Path
) -> None:
    """Later versions may add arguments at the end, but move and change none that we pass."""
    here = schemas(unpacked(version_here(), wheels))
    for name in calls:
        theirs, ours = arguments(on_cards[name]), arguments(here[name])
        assert list(ours)[: len(theirs)] == list(theirs), name
        assert {key: ours[key] for key in theirs} == theirs, name


def collectives_of(wheel: Path) -> dict[str, list[str]]:
    """Returns the arguments of what torch_npu puts in place of torch.distributed's functions.

    It calls them as torch does, with an underscore in front.
    """
    module = ast.parse((wheel / "torch_npu/distributed/distributed_c10d.py").read_text("utf-8"))
    return {
        one.name[1:]: [arg.arg for arg in (*one.args.args, *one.args.kwonlyargs)]
        for one in module.body
        if isinstance(one, ast.FunctionDef) and hasattr(torch.distributed, one.name[1:])
    }


def our_collectives() -> Iterator[tuple[str, ast.Call]]:
    """Yields our calls of torch.distributed's functions, with their names."""
    for path in Path(glm3cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func.value) in ("dist", "torch.distributed"):
                yield node.func.attr, node


def test_our_calls_fit_what_replaces_collectives_on_cards(wheel_of_cards: Path) -> None:
    replaced = collectives_of(wheel_of_cards)
    assert {"gather_object", "batch_isend_irecv"} <= replaced.keys()
    ours = [(name, call) for name, call in our_collectives() if name in replaced]
    assert {name for name, _ in ours} >= {"gather_object"}
    for name, call in ours:
        assert {one.arg for one in call.keywords} <= set(replaced[name]), ast.unparse(call)
        assert len(call.args) <= len(replaced[name])


def test_torchs_adamw_has_a_kernel_on_cards(wheels: Path) -> None:
    """Without MindSpeed the optimizer runs as one operator for each weight."""
    library = unpacked(ASCEND["torch_npu"], wheels) / "torch_npu/lib/libtorch_npu.so"
    assert b"wrapper_NPU___fused_adamw_\0" in library.read_bytes()


def test_the_advice_has_the_torch_that_the_wheel_asks_for(wheels: Path) -> None:
    [metadata] = unpacked(ASCEND["torch_npu"], wheels).glob("*.dist-info/METADATA")
    wanted = re.findall(r"^Requires-Dist: (torch\b.*)$", metadata.read_text("utf-8"), re.M)
    assert wanted
    assert set(wanted) <= set(pip_install(Machine()).split())


def test_a_schema_is_taken_apart() -> None:
    text = "npu_x(Tensor input, int[2] size=[1, 2], *, Tensor? mask=None) -> (Tensor, Tensor)"
    assert arguments(text) == {"input": "Tensor", "size": "int[2]", "mask": "Tensor?"}


def test_what_is_planned_with_has_the_schemas_of_cards(on_cards: dict[str, str]) -> None:
    planned = {schema.split("(")[0]: schema for schema in SCHEMAS}
    assert planned.keys() == {name for name in KERNELS if "base" not in name}
    for name, schema in planned.items():
        ours, theirs = arguments(schema), arguments(on_cards[name])
        assert list(theirs)[: len(ours)] == list(ours), name  # releases add some at the end
        assert {key: theirs[key] for key in ours} == ours, name
