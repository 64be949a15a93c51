"""Training on several machines, with torchrun on each, without shared storage."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_port
from tests.support.project import Project, call, environment, events, steps
from tests.support.train_command import checkpoints, losses, options, succeed

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def begin(command: list[Any], folder: Path, log: str, **more: Any) -> "subprocess.Popen[bytes]":
    """Starts a command in `folder`; its stdout and stderr go to a file there."""
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


def train_on_two_machines(tmp_path: Path, command: list[Any]) -> None:
    """Runs a command to its end on two machines, each in a folder of its own."""
    port, nodes = free_port(), []
    for rank in range(2):
        where = ("--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1)
        master = ("--master_addr", "127.0.0.1", "--master_port", port)
        launch = [*TORCHRUN, *where, *master, "-m", "glm3cli", *command]
        nodes.append(begin(launch, tmp_path / f"node{rank}", "log"))
    codes = [finish(node) for node in nodes]
    logs = [(tmp_path / f"node{rank}/log").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)


@pytest.mark.slow
@pytest.mark.dist
def test_two_machines_with_disks_of_their_own(project: Project, tmp_path: Path) -> None:
    """Each machine has its own copy of the data, preprocesses what is raw, and saves its part."""
    for rank in range(2):
        (tmp_path / f"node{rank}/data").mkdir(parents=True)
        for path in project.folder.glob("text*"):
            shutil.copy(path, tmp_path / f"node{rank}/data")  # at a time of its own
    data = ["--data", "2:data/text.jsonl", "--data", "1:data/text_text_document"]
    changes = {"data": None, "save_interval": None, "keep_last": 1, "data_cache": "cache"}
    for train_iters in (4, 6):
        command = options(project, Path("run"), **changes, train_iters=train_iters)
        train_on_two_machines(tmp_path, [*command, *data])
    assert [len([*(tmp_path / f"node{rank}/cache").glob("*.bin")]) for rank in range(2)] == [1, 1]
    runs = [tmp_path / f"node{rank}/run" for rank in range(2)]
    assert [checkpoints(run) for run in runs] == [["iter_0000006"]] * 2
    assert not (runs[1] / "metrics.jsonl").exists()
    # As one rank trains, which has the whole batch.
    alone = options(project, tmp_path / "alone", data=None, save_interval=None)
    blend = [x for w in (2, 1) for x in ("--data", f"{w}:{project.text}")]
    succeed(*alone, *blend)
    assert losses(runs[0]) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert events(runs[0], "start")[0]["dp"] == 2
    assert events(runs[0], "resume")[0]["iteration"] == 4
    assert [event["number"] for event in events(runs[0], "storages")] == [2, 2]
    # One machine's part is no model, and says what would make it one.
    ended = call("convert", "mg2hf", runs[1], tmp_path / "hf")
    assert ended.code == 3
    assert "copy the files of " in ended.err
    shutil.copytree(runs[0] / "iter_0000006", runs[1] / "iter_0000006", dirs_exist_ok=True)
    succeed("convert", "inspect", runs[1] / "iter_0000006", "--check")
    succeed("convert", "mg2hf", runs[1], tmp_path / "hf")


def test_a_rank_that_nobody_started_with_it_says_so_by_itself(
    project: Project, tmp_path: Path
) -> None:
    """Rank 1 prints its error, too, since no launcher would."""
    rank = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "glm3cli", *options(project, tmp_path / "run")]
    process = begin(command, tmp_path, "log", GLM3_START_TIMEOUT=1, **rank)
    assert finish(process) == 4
    said = (tmp_path / "log").read_text()
    assert "error: rank 1 of 2 on " in said
    assert f"has waited 1 s for rank 0 at 127.0.0.1:{rank['MASTER_PORT']}" in said
    assert "Traceback" not in said


def ranks_of(launcher: int) -> dict[int, int]:
    """Returns the processes that a launcher has started, by rank."""
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
    changes = {"train_iters": 40, "save_interval": 5, "keep_last": 1}
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
    assert steps(run)[-1]["iteration"] == 40
    succeed(*options(project, tmp_path / "alone", **changes | {"save_interval": None}))
    assert losses(run)[-1] == pytest.approx(losses(tmp_path / "alone")[-1], rel=1e-5)
