"""`glm3 generate --chat` as a user has it: on a terminal, by pipes, and on several ranks."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.chain_model import CALL, ENDLESS, write_chain_model
from tests.support.project import Ended, call, environment
from tests.support.terminal import CTRL_C, CTRL_D, ENTER, UP, Terminal

TOOLS = [{"name": "get_weather", "description": "天气", "parameters": {"type": "object"}}]
SHOWN_CALL = "get_weather(city='北京', days=3)\n"
FUNCTIONS = '''
"""Tools of a user."""

print("imported")

def get_weather(city: str, days: int = 1):
    """Tells the weather.

    Args:
        city: Where.
        days: How far ahead.
    """
    return {"city": city, "sun": days}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def caller(folder: Path) -> Path:
    """A model that always calls a tool."""
    return write_chain_model(folder / "caller", *CALL, "<|observation|>")


@pytest.fixture(scope="module")
def speaker(folder: Path) -> Path:
    """A model whose answers are short, and begin with the empty line that ChatGLM3's have."""
    return write_chain_model(folder / "speaker", "\n", "北京", " is", " cold", "<|user|>")


@pytest.fixture(scope="module")
def endless(folder: Path) -> Path:
    """A model whose answers have no end."""
    return write_chain_model(folder / "endless", *ENDLESS)


def chat(model: Path, *options: object, lines: str) -> Ended:
    arguments = ("--model", model, "--device", "cpu", "--chat", "--greedy", *options)
    ended = call("generate", *arguments, stdin=lines)
    assert ended.code == 0, ended.err
    return ended


def saved(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))["messages"]


def test_answers_are_all_that_stdout_gets(speaker: Path) -> None:
    ended = chat(speaker, lines="hi\n\n/help\nagain\n/exit\nnever\n")
    assert ended.out == "北京 is cold\n" * 2
    assert [line.split()[0] for line in ended.err.splitlines()[:8]] == [
        f"/{name}" for name in ["help", "clear", "system", "tools", "retry", "save", "load", "exit"]
    ]


def test_turns_are_saved_loaded_and_taken_back(speaker: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    chat(speaker, lines=f'/system Be kind.\n"""\na\n b"""\nc\\\nd\n/save {first}\n')
    answer = {"role": "assistant", "content": "北京 is cold"}
    told = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\n b"},
        answer,
        {"role": "user", "content": "c\nd"},
        answer,
    ]
    assert saved(first) == told
    chat(speaker, lines=f"x\n/load {first}\n/retry\n/save {second}\n")
    assert saved(second) == told
    chat(speaker, lines=f"/load {first}\n/clear\n/retry\ny\n/save {second}\n")
    assert saved(second) == [told[0], {"role": "user", "content": "y"}, answer]


def test_a_call_is_shown_and_its_result_is_typed(caller: Path, tmp_path: Path) -> None:
    tools, file = tmp_path / "tools.json", tmp_path / "saved"
    tools.write_text(json.dumps(TOOLS), encoding="utf-8-sig")
    ended = chat(caller, "--tools", tools, lines=f'hi\n{{"t": 3}}\n/tools\n/save {file}\n')
    assert ended.out == SHOWN_CALL * 2
    assert "get_weather (you type its result)" in ended.err
    turns = saved(file)
    assert [turn["role"] for turn in turns] == [
        "system",
        "user",
        "assistant",
        "observation",
        "assistant",
    ]
    assert turns[0]["tools"] == TOOLS
    assert turns[2] == {
        "role": "assistant",
        "metadata": "get_weather",
        "content": "".join(CALL[1:]).removeprefix("\n"),
    }
    assert turns[3]["content"] == '{"t": 3}'


def test_functions_are_run_only_if_the_user_wants_it(
    caller: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tools, file = tmp_path / "tools.py", tmp_path / "saved"
    tools.write_text(FUNCTIONS)
    shown = chat(caller, "--tools", tools, lines=f"hi\n/save {file}\n")
    assert shown.out == SHOWN_CALL
    assert "imported" not in shown.out + shown.err
    [described] = saved(file)[0]["tools"]
    run = chat(caller, "--tools", tools, "--run-tools", lines=f"hi\n/save {file}\n")
    # This model calls again whatever it reads, so the chat ends its calls.
    assert run.out == "imported\n" + SHOWN_CALL * 8
    assert "8 calls in a row" in run.err
    turns = saved(file)
    assert turns[0]["tools"] == [described]
    assert [turn["role"] for turn in turns[2:]] == ["assistant", "observation"] * 8
    assert turns[3]["content"] == '{"city": "北京", "sun": 3}'


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/what", "/what is no command; /help lists them"),
        ("/clear all", "/clear takes nothing after it"),
        ("/retry", "nothing was said yet"),
        ("/save", "/save FILE"),
        ("/load", "/load FILE"),
        ("/save /none/none", "error: /none/none can't be written"),
        ("/save ~nobody-of-this-name/a", "error: ~nobody-of-this-name/a can't be written"),
        ("/save /", "error: / can't be written"),
        ("/save {pipe}", "is a device or a pipe; give the name of a file"),
        ("/save a\0b", "error: a\0b can't be written"),
        ("/load a\0b", "embedded null byte"),
        ("/tools a\0b.py", "embedded null byte"),
        ("/load none", "error: none: No such file or directory"),
        ("/load {bad}", "is no UTF-8"),
        ("/load {robot}", "messages[0].role: expected one of"),
        ("/tools {robot}", "holds dict, not a list of tools"),
        ("a" * 5000, "tokens, and with its answer the model takes 4,096"),
    ],
)
def test_what_can_t_be_done_is_said_and_nothing_is_lost(
    speaker: Path, tmp_path: Path, line: str, error: str
) -> None:
    bad, robot, pipe, file = (tmp_path / name for name in ("bad", "robot", "pipe", "saved"))
    os.mkfifo(pipe)
    bad.write_bytes(b'{"messages": "\xff"}')
    robot.write_text('{"messages": [{"role": "robot", "content": "a"}]}')
    line = line.format(bad=bad, robot=robot, pipe=pipe)
    ended = chat(speaker, "--system", "S", lines=f"{line}\n/save {file}\nhi\n")
    assert error in ended.err
    assert saved(file) == [{"role": "system", "content": "S"}]
    assert ended.out == "北京 is cold\n"


def test_a_line_that_is_no_text_is_left_out(speaker: Path) -> None:
    program = [sys.executable, "-m", "glm3cli", "generate", "--chat", "--greedy"]
    done = subprocess.run(
        [*program, "--model", speaker, "--device", "cpu"],
        input=b"\xff\xfe\nhi\r\n",
        capture_output=True,
        timeout=120,
        env=environment(),
        check=True,
    )
    assert done.stdout.decode() == "北京 is cold\n"
    assert "error: the line is no valid text" in done.stderr.decode()


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("t.json", "[", "no valid JSON"),
        ("t.json", "3", "holds int, not a list of tools"),
        ("t.json", '[{"name": 3}]', "tool 1 has no name"),
        ("t.json", '[{"name": "a"}, {"function": {"name": "a"}}]', "two tools with the name a"),
        ("t.py", "def f(:", "is no Python"),
        ("t.py", "x = 1", "has no public function"),
        ("t.py", "async def f(): pass", "t.py:1: f is async"),
        ("t.py", "def f(*a): pass", "t.py:1: f has parameters without a name"),
    ],
)
def test_malformed_tools_are_a_sentence(tmp_path: Path, name: str, text: str, error: str) -> None:
    (tmp_path / name).write_text(text)
    ended = call("generate", "--model", "none", "--chat", "--tools", tmp_path / name)
    assert ended.code == 3
    assert error in ended.err.split("hint: ")[0]


def test_tools_that_can_t_be_imported_are_a_sentence(speaker: Path, tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text("def f(): pass\nraise OSError('no such sensor')")
    options = ("--chat", "--tools", tmp_path / "t.py", "--run-tools", "--device", "cpu")
    ended = call("generate", "--model", speaker, *options)
    assert ended.code == 3
    assert "t.py can't be run: OSError: no such sensor" in ended.err


def test_a_terminal(endless: Path, tmp_path: Path) -> None:
    options = ("--model", endless, "--device", "cpu", "--greedy", "--max-new-tokens", 100_000)
    with Terminal(tmp_path, "generate", "--chat", *options) as terminal:
        terminal.wait_for("you> ")
        terminal.type("tell me" + ENTER)
        terminal.wait_for("windrainsnowwindrain")
        terminal.type(CTRL_C)
        terminal.wait_for("stopped; /retry asks again")
        terminal.wait_for("you> ")
        terminal.type("never said")
        terminal.wait_for("never said")
        terminal.interrupt("/exit or Ctrl-D ends the chat")
        terminal.wait_for("you> ")
        terminal.type(UP)
        terminal.wait_for("tell me")
        terminal.type(" more" + ENTER)
        terminal.wait_for("windrainsnowwindrain")
        terminal.type(CTRL_C)
        terminal.wait_for("you> ")
        terminal.type("/sa\t")
        terminal.wait_for("/save")
        terminal.type(f" {tmp_path / 'saved'}{ENTER}")
        terminal.wait_for("saved 4 turns")
        terminal.type('"""' + ENTER)
        terminal.wait_for("...> ")
        terminal.interrupt("/exit or Ctrl-D ends the chat")
        terminal.wait_for("you> ")
        terminal.type(CTRL_D)
        assert terminal.code() == 0
    turns = saved(tmp_path / "saved")
    assert [turn["content"] for turn in turns if turn["role"] == "user"] == [
        "tell me",
        "tell me more",
    ]
    assert turns[1]["content"].startswith("windrainsnow")
    history = tmp_path / ".local/state/glm3/chat_history"
    assert history.read_text().splitlines()[:2] == ["tell me", "tell me more"]
    assert history.stat().st_mode & 0o77 == 0


def test_a_stream_has_whole_characters(folder: Path, tmp_path: Path) -> None:
    """Each byte of the character is a token of its own."""
    model = write_chain_model(folder / "bytes", "\n", "<0xE4>", "<0xBA>", "<0xAC>", "<|user|>")
    with Terminal(
        tmp_path, "generate", "--chat", "--greedy", "--model", model, "--device", "cpu"
    ) as terminal:
        terminal.wait_for("you> ")
        terminal.type("hi" + ENTER)
        assert terminal.wait_for("you> ") == "hi\n京\nyou> "


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("sizes", [("--tp", 2), ("--pp", 2), ()])
def test_ctrl_c_stops_the_answers_of_all_ranks(
    endless: Path, tmp_path: Path, sizes: tuple[object, ...]
) -> None:
    options = ("--model", endless, "--device", "cpu", "--greedy", "--max-new-tokens", 100_000)
    with Terminal(tmp_path, "generate", "--chat", *options, "--nproc", 2, *sizes) as terminal:
        for text in ("one", "two"):
            terminal.wait_for("you> ")
            terminal.type(text + ENTER)
            terminal.wait_for("windrainsnowwindrain")
            terminal.type(CTRL_C)
            terminal.wait_for("stopped; /retry asks again")
        terminal.wait_for("you> ")
        terminal.type(f"/save {tmp_path / 'saved'}{ENTER}")
        terminal.wait_for("saved 4 turns")
        terminal.type("/exit" + ENTER)
        assert terminal.code() == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_a_chat_in_tmux(endless: Path, tmp_path: Path) -> None:
    def tmux(*arguments: object) -> str:
        command = ["tmux", "-S", str(tmp_path / "socket"), *map(str, arguments)]
        env = {**environment(), "HOME": str(tmp_path), "XDG_STATE_HOME": ""}
        return subprocess.run(
            command, env=env, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in (screen := tmux("capture-pane", "-p", "-J")):
            assert time.monotonic() < deadline, screen
            time.sleep(0.1)

    options = f"--greedy --device cpu --max-new-tokens 100000 --model {endless}"
    program = f"{sys.executable} -m glm3cli generate --chat {options}; cat"
    tmux("-u", "new-session", "-d", "-x", 80, "-y", 12, program)
    try:
        wait_for("you>")
        tmux("send-keys", "你好", "Enter")
        wait_for("windrainsnowwindrain")
        tmux("send-keys", "C-c")
        wait_for("stopped; /retry asks again")
        tmux("send-keys", "Up")
        wait_for("you> 你好")
        tmux("send-keys", "BSpace", "BSpace", f"/save {tmp_path / 'saved'}", "Enter")
        wait_for("saved 2 turns")
        tmux("send-keys", "C-d")
    finally:
        tmux("kill-server")
    assert saved(tmp_path / "saved")[0] == {"role": "user", "content": "你好"}
