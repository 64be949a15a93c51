"""The README promises options, versions, places and programs: they must exist and work."""

import re
import tomllib
from typing import Any, get_args

import pytest
import typer

from glm3cli import errors
from glm3cli.cli.app import app
from glm3cli.config.convert import ToHfConfig, ToMegatronConfig
from glm3cli.device.doctor.pins import ASCEND
from tests.support.readme import PAGES, README, ROOT, blocks, table

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
    install = next(block for block in blocks("bash") if "'.[npu]'" in block)
    assert f"torch=={ASCEND['torch']} " in install
    assert f"python{ASCEND['Python']} -m venv" in install
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extra = project["optional-dependencies"]["npu"]
    assert f"torch-npu=={ASCEND['torch_npu']}" in extra
    assert any(item.endswith(f"MindSpeed.git@{ASCEND['MindSpeed']}") for item in extra)
    assert f"megatron-core=={ASCEND['megatron-core']}" in project["dependencies"]


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


def test_the_page_is_short():
    assert len(README.split()) < 1800


def test_every_room_has_a_line_with_its_entry():
    (tree,) = [block for block in blocks("") if block.startswith("glm3cli/")]
    rows = re.findall(r"^  ([a-z]+)/ .* (\S+\.py):(\w+)$", tree, re.M)
    rooms = {path.parent.name for path in (ROOT / "glm3cli").glob("*/__init__.py")}
    assert {room for room, _, _ in rows} == rooms
    for room, file, name in rows:
        text = (ROOT / "glm3cli" / room / file).read_text("utf-8")
        assert re.search(rf"^ *(def|class) {name}\b", text, re.M), f"{room}/{file}: {name}"


def test_every_file_named_exists():
    named = set(re.findall(r"`((?!tests/)[a-z]+(?:/[a-z_]+)+\.py)`", README))
    assert len(named) > 15
    assert [name for name in named if not (ROOT / "glm3cli" / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(((?!https?:|#)[^)#]+)", PAGES[page])
    assert links
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_chinese_page_has_the_same_commands():
    ours, theirs = (
        {
            line
            for block in re.findall(r"```bash\n(.*?)```", text, re.S)
            for line in block.split("\n")
        }
        for text in PAGES.values()
    )
    assert theirs <= ours


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
