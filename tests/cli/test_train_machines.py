"""Training on several machines: torchrun on each, without shared storage, and what goes wrong."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import Project, environment, events, steps
from tests.support.train_command import losses, options, succeed

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
BRIEF = {"train_iters": 4, "save_interval": None}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def begin(command: list[Any], folder: Path, log: str, **more: Any) -> "subprocess.Popen[bytes]":
    """Starts a command in `folder`; both its outputs go to a file there."""
    with (folder / log).open("wb") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() | {name: str(value) for name, value in more.items()},
        )


def finish(process: "subprocess.Popen[bytes]", timeout: float = 120) -> int:
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.dist
def test_two_machines_with_disks_of_their_own(project: Project, tmp_path: Path) -> None:
    """Each has its own copy of the data, and preprocesses a part of it by itself."""
    port, nodes = free_port(), []
    command = options(project, tmp_path / "run", data=None, data_cache="cache", **BRIEF)
    command += ["--data", "2:data/text.jsonl", "--data", "1:data/text_text_document"]
    for rank in range(2):
        folder = tmp_path / f"node{rank}"
        (folder / "data").mkdir(parents=True)
        for path in project.folder.glob("text*"):
            shutil.copy(path, folder / "data")  # at a time of its own
        where = ("--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1)
        master = ("--master_addr", "127.0.0.1", "--master_port", port)
        launch = [*TORCHRUN, *where, *master, "-m", "glm3cli", *command]
        nodes.append(begin(launch, folder, "log"))
    codes = [finish(node) for node in nodes]
    logs = [(tmp_path / f"node{rank}/log").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    assert [len([*(tmp_path / f"node{rank}/cache").glob("*.bin")]) for rank in range(2)] == [1, 1]
    # As one rank trains, which has the whole batch.
    alone = options(project, tmp_path / "alone", data=None, **BRIEF)
    blend = [x for w in (2, 1) for x in ("--data", f"{w}:{project.text}")]
    succeed(*alone, *blend)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert events(tmp_path / "run", "start")[0]["dp"] == 2


def test_a_rank_that_nobody_started_with_it_says_so_by_itself(
    project: Project, tmp_path: Path
) -> None:
    """Also rank 1, where no launcher would tell."""
    rank = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "glm3cli", *options(project, tmp_path / "run")]
    process = begin(command, tmp_path, "log", GLM3_START_TIMEOUT=1, **rank)
    assert finish(process) == 4
    said = (tmp_path / "log").read_text()
    assert "error: rank 1 of 2 on " in said
    assert f"has waited 1 s for rank 0 at 127.0.0.1:{rank['MASTER_PORT']}" in said
    assert "Traceback" not in said


def ranks_of(launcher: int) -> dict[int, int]:
    """The processes that a launcher has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher:
            for variable in variables:
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = int(path.name)
    return found


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_rank_is_started_again_and_the_run_goes_on(
    project: Project, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {"train_iters": 20, "save_interval": 5, "keep_last": 1}
    command = options(project, run, **changes)
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    size = ("--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 2, *where)
    # The machines count differently how often they started: only one of them lost a rank.
    launch = [*TORCHRUN, *size, "-m", "glm3cli", *command]
    nodes = [begin(launch, tmp_path, f"log{node}") for node in range(2)]
    deadline = time.monotonic() + 100
    while not (run / "iter_0000005").exists():
        assert nodes[0].poll() is None, (tmp_path / "log0").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = {rank: process for node in nodes for rank, process in ranks_of(node.pid).items()}
    os.kill(ranks[1], signal.SIGKILL)
    assert [finish(node) for node in nodes] == [0, 0], (tmp_path / "log0").read_text()
    resumed = events(run, "resume")
    assert len(resumed) == 1
    assert resumed[0]["iteration"] % 5 == 0
    assert steps(run)[-1]["iteration"] == 20
    succeed(*options(project, tmp_path / "alone", **changes | {"save_interval": None}))
    assert losses(run)[-1] == pytest.approx(losses(tmp_path / "alone")[-1], rel=1e-5)
