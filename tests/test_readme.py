"""The README promises options, versions, places, and tests: they must exist."""

import re
from typing import Any, get_args

import typer

from glm3cli import errors
from glm3cli.cli.app import app
from glm3cli.config.convert import ToHfConfig, ToMegatronConfig
from glm3cli.device.doctor.versions import ASCEND
from tests.support.readme import README, ROOT, blocks, table

ASCEND_SECTION = "On an Ascend server"


def test_every_command_of_the_table_exists():
    named = [row[0].strip("`") for row in table("The commands")]
    group = typer.main.get_command(app)
    assert sorted(named) == sorted(group.commands)  # type: ignore[attr-defined]


def test_every_option_named_in_the_text_exists():
    group = typer.main.get_command(app)
    commands: list[Any] = [group]
    known = {"--help"}
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    torchruns = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    torchruns |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--max-restarts"}
    slurms = {"--nodes", "--ntasks-per-node", "--time", "--signal"}
    others = {"--name", "--network", "--shm-size", "--index-url", "--local-dir"}  # docker, pip, hf
    told = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert told <= known | torchruns | slurms | others


def test_the_versions_for_ascend_are_those_that_the_doctor_wants():
    assert {row[0]: row[1].removesuffix(" or newer") for row in table(ASCEND_SECTION)} == ASCEND
    install = next(block for block in blocks("bash") if "MindSpeed.git" in block)
    assert f"torch=={ASCEND['torch']} " in install
    assert f"torch-npu=={ASCEND['torch_npu']} " in install
    assert f"git clone -b {ASCEND['MindSpeed']} " in install
    assert f"python{ASCEND['Python']} -m venv" in install


def test_links_within_the_page_lead_to_a_heading():
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.M
    )
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert links
    assert links <= anchors


def test_the_two_commands_that_start_everything_are_there():
    demo, tests = blocks("bash")[:2]
    assert demo.strip().endswith("pip install -e . && glm3 demo")
    assert tests.strip() == "pip install -e '.[test]' && pytest"
    assert all(len(block.strip().splitlines()) == 1 for block in (demo, tests))


def test_every_claim_is_proved_by_a_test_that_exists():
    rows = table("What is guaranteed, and which test proves it")
    assert len(rows) >= 6
    for claim, _, proofs in rows:
        named = re.findall(r"`([^`]+)`", proofs)
        assert named, claim
        for pattern in named:
            assert list(ROOT.glob(pattern)), f"{claim}: {pattern}"


def test_every_place_named_exists():
    (tree,) = [block for block in blocks("") if block.startswith("glm3cli/")]
    folders = re.findall(r"(?:^| )([a-z]+)/ ", tree)
    assert set(folders) == {
        path.name for path in (ROOT / "glm3cli").iterdir() if (path / "__init__.py").is_file()
    }
    for name in re.findall(r"`((?!tests/)[a-z]+/[a-z_]+\.py)`", README):
        assert (ROOT / "glm3cli" / name).is_file(), name
    assert (ROOT / ".ci/run").is_file()


def test_every_layout_can_be_read_and_written_as_told():
    written = {
        layout
        for config, field in ((ToHfConfig, "layout"), (ToMegatronConfig, "format"))
        for layout in get_args(config.model_fields[field].annotation)
    }
    rows = {row[0].strip("`"): row[2:] for row in table("Layouts")}
    assert {name for name, (_, how) in rows.items() if how != "no"} == written
    assert all(how == "yes" for how, _ in rows.values())


def test_the_exit_codes_are_those_of_the_errors():
    text = README.split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    told = {int(code) for code in re.findall(r"(?:^|, )(\d+) [a-z]", text, re.M)}
    ours = {value.exit_code for value in vars(errors).values() if hasattr(value, "exit_code")}
    assert told == {0, 1} | ours
