"""The rules that keep the code readable, checked on its syntax trees."""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "glm3cli"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FILES = 16  # of a folder
# Where else than in device/ a chip may be named, and why.
NAMES_CHIPS = {
    "__init__.py",  # the values of `device`
    "config/launch.py",  # the values of --device
    "cli/app.py",  # what the program is for
    "cli/epilogs.py",  # what a container with NPUs needs
    "checkpoint/pickles.py",  # the packages whose enums stand in other trainers' files
}

# Who may catch any exception, and why.
CATCHES_EVERYTHING = {
    "cli/app.py",  # our own errors, which become sentences
    "checkpoint/convert/verify_glm.py",  # damaged files make transformers raise nearly anything
    "checkpoint/layouts/dist.py",  # so does unpickling them
    "checkpoint/pickles.py",  # the same
    "checkpoint/run/resume.py",  # and megatron-core's reading
    "device/npu/device.py",  # so does torch_npu where a part of CANN is missing
    "infer/chat/session.py",  # our own errors, which don't end a chat
    "infer/chat/toolbox.py",  # functions that users give to a chat raise what they like
    "numerics/outcome.py",  # an operator may refuse by any, and the others are to be checked
    "parallel/storage.py",  # our own errors, which become those of all ranks
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    text: str
    tree: ast.Module


def read_module(path: Path) -> Module:
    text = path.read_text("utf-8")
    return Module(text, ast.parse(text))


MODULES = {
    path.relative_to(PACKAGE).as_posix(): read_module(path)
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def public_definitions(
    body: list[ast.stmt], owner: str = ""
) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions and classes, and the public methods of public classes."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{owner}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{node.name}.")


def test_the_package_is_found():
    assert {"cli/app.py", "device/npu/device.py"} <= MODULES.keys()


def test_files_are_short():
    lengths = {name: len(module.text.splitlines()) for name, module in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short():
    lengths = {
        f"{name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, module in MODULES.items()
        for node in ast.walk(module.tree)
        if isinstance(node, Function)
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_modules_and_all_that_they_offer_have_docstrings():
    bare = [name for name, module in MODULES.items() if not ast.get_docstring(module.tree)]
    bare += [
        f"{name}: {definition}"
        for name, module in MODULES.items()
        for definition, node in public_definitions(module.tree.body)
        if not ast.get_docstring(node)
    ]
    assert bare == []


# A sentence that begins so says nothing by itself: of what?
RIDDLES = re.compile(r"(All of it|Of|In|On|As|By|For|From|With|Also|Until|At|Through|Where|When)\b")
IS_TOLD = re.compile(r"\b(is|are|was|were) told\b")


def is_dataclass(node: ast.ClassDef) -> bool:
    names = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
    return "dataclass" in names


def docstrings(module: Module) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, and of all that it defines."""
    for node in ast.walk(module.tree):
        if isinstance(node, Function | ast.ClassDef | ast.Module):
            name = "" if isinstance(node, ast.Module) else node.name
            if text := ast.get_docstring(node):
                yield name, text


def test_every_attribute_of_a_public_dataclass_is_explained():
    missing = []
    for name, module in MODULES.items():
        for owner, node in public_definitions(module.tree.body):
            if not (isinstance(node, ast.ClassDef) and is_dataclass(node)):
                continue
            listed = (ast.get_docstring(node) or "").partition("Attributes:")[2]
            fields = [
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            ]
            told = set(re.findall(r"^ *(\w+):", listed, re.M))
            missing += [
                f"{name}: {owner}.{field}"
                for field in fields
                if not field.startswith("_") and field not in told
            ]
    assert missing == []


def test_docstrings_can_be_read_by_themselves():
    found = [
        f"{name}: {owner}: {text.splitlines()[0]}"
        for name, module in MODULES.items()
        for owner, text in docstrings(module)
        if RIDDLES.match(text) or IS_TOLD.search(text)
    ]
    assert found == []


def imports_of_ours() -> dict[str, set[str]]:
    """The files of the package that each of its files imports, wherever the import stands."""
    files = {name.removesuffix("/__init__.py").removesuffix(".py"): name for name in MODULES}
    found: dict[str, set[str]] = {}
    for name, module in MODULES.items():
        found[name] = set()
        for dotted in imports_of(module.tree):
            place = dotted.removeprefix("glm3cli.").replace(".", "/")
            # `from package.module import name` names a module or what is in one.
            target = files.get(place) or files.get(place.rpartition("/")[0])
            if dotted.startswith("glm3cli.") and target:
                found[name].add(target)
    return found


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(imports_of_ours()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_rooms_are_not_crowded():
    sizes = Counter(str(Path(name).parent) for name in MODULES)
    assert {room: size for room, size in sizes.items() if size > MAX_FILES} == {}


def test_every_room_has_a_guide():
    guides = {name: m for name, m in MODULES.items() if name.endswith("/__init__.py")}
    assert len(guides) > 20
    short = [name for name, m in guides.items() if len(ast.get_docstring(m.tree).split()) < 40]
    assert short == []


def test_only_the_command_line_draws_progress_bars():
    found = {name for name, m in MODULES.items() if "rich.progress" in m.text}
    assert found == {"cli/progress.py"}


def test_what_has_global_arguments_is_not_imported():
    forbidden = re.compile(r"megatron\.(training|legacy|post_training)\b|click\b")
    found = {name: [*filter(forbidden.match, imports_of(m.tree))] for name, m in MODULES.items()}
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_modules_are_named_for_what_they_do():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "manager"}
    assert [name for name in MODULES if drawers & {*Path(name).with_suffix("").parts}] == []


def test_only_the_device_layer_names_chips():
    # MindSpeed-LLM is a trainer, whose scripts are translated; their flags do name chips.
    chips = re.compile(
        r"(?<![a-z])npu(?![a-z])|ascend|mindspeed(?!-llm)|torch\.cuda|hccl|nccl", re.I
    )
    found = {name for name, m in MODULES.items() if chips.search(m.text)}
    allowed = ("device/", "config/scripts/")
    assert {name for name in found if not name.startswith(allowed)} == NAMES_CHIPS


def test_homes_are_expanded_in_one_place():
    """`Path.expanduser` raises a RuntimeError for a user who isn't known, which nobody expects."""
    found = {name for name, m in MODULES.items() if "expanduser(" in m.text}
    assert found == {"host/files.py"}


def test_numbers_of_the_environment_are_read_in_one_place():
    """What a user or a cluster has set may be empty or no number, which `int` can't tell of."""
    read = re.compile(r"\b(int|float)\((os\.)?environ(ment)?\.get\b")
    assert [name for name, m in MODULES.items() if read.search(m.text)] == []


def test_only_the_command_line_catches_everything():
    # Cleaning up and raising again is fine.
    broad = re.compile(r"\b(Glm3Error|BaseException|Exception)\b|^everything$")
    found = [
        name
        for name, module in MODULES.items()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler)
        and broad.search(ast.unparse(node.type) if node.type else "everything")
        and ast.unparse(node.body[-1]) != "raise"
    ]
    assert set(found) == CATCHES_EVERYTHING


def test_imports_go_downwards_only():
    # The contracts in pyproject.toml; a process of its own, since the tests have imported all.
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run(
        [program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
