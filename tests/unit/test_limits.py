"""Limits of the machine: the paths of sockets, open files, and names of files."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from glm3cli.errors import DeviceError
from glm3cli.host import limits
from glm3cli.host.limits import allow_open_files, socket_folder

# In a process of its own: multiprocessing keeps the folder that it has once made.
TALK = """
import multiprocessing, sys, tempfile
from multiprocessing.managers import SyncManager
from glm3cli.host.limits import socket_folder
if __name__ == "__main__":
    folder = socket_folder()
    manager = SyncManager(f"{folder}/talk", ctx=multiprocessing.get_context("spawn"))
    manager.start()
    queue = manager.Queue()
    queue.put(tempfile.gettempdir())
    print(queue.get())
    process = multiprocessing.get_context("forkserver").Process(target=print, args=(folder,))
    sys.stdout.flush()
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("length", [20, 74, 75, 76, 200])
def test_processes_talk_wherever_temporary_files_are(tmp_path: Path, length: int) -> None:
    (tmp_path / "talk.py").write_text(TALK)
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        folder = Path(base) / ("t" * (length - len(base) - 1) or "t")
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, tmp_path / "talk.py"],
            env={**os.environ, "TMPDIR": str(folder)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        used, sockets = done.stdout.splitlines()
        assert used == str(folder)  # other temporary files stay where they are
        assert Path(sockets).parent == (folder if len(str(folder)) <= 75 else Path("/tmp"))


def test_no_short_folder_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 75)
    monkeypatch.setattr(limits, "_SHORT_FOLDERS", ("/none",))
    with pytest.raises(DeviceError, match="has too long a path for the sockets") as caught:
        socket_folder()
    assert caught.value.hint == "export TMPDIR with a path of at most 75 bytes"


@pytest.mark.parametrize(
    ("soft", "hard", "now"),
    [(64, 4096, 200), (200, 4096, 200), (1024, 4096, 1024), (64, -1, 200), (-1, -1, -1)],
)
def test_the_soft_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, now: int
) -> None:
    found = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: found[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: found.append(limits))
    allow_open_files(200)
    assert found[-1] == (now, hard)


def test_the_hard_limit_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(DeviceError, match="may open 64 files at once, and needs 65") as caught:
        allow_open_files(65)
    assert "ulimit -n" in caught.value.hint
