"""Runs that are killed, damaged, out of disk space, asked to stop, or started twice."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.kills import kill_at_random
from tests.support.project import Ended, Project, call, end, events, start, steps
from tests.support.train_command import checkpoints, has_steps, losses, options, succeed, wait_until

pytestmark = pytest.mark.slow


def weights_of(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_passed_over(
    run: Path, project: Project, first: tuple[Path, Ended]
) -> None:
    damaged = weights_of(run / "iter_0000006")
    flip_a_byte(damaged)
    succeed(*options(project, run))
    [passed] = events(run, "passed_over")
    assert passed["path"] == str(run / "iter_0000006")
    assert passed["problem"] == f"{damaged.name} differs from what was written"
    assert events(run, "resume")[0]["iteration"] == 3
    assert losses(run)[-3:] == losses(first[0])[3:]
    succeed("convert", "inspect", run / "iter_0000006", "--check")


@pytest.mark.parametrize("remove", [True, False])
def test_a_checkpoint_whose_copying_was_cut_off_is_passed_over(
    run: Path, project: Project, remove: bool
) -> None:
    (run / "iter_0000006/glm3-manifest.json").unlink()
    lacking = weights_of(run / "iter_0000006")
    size = lacking.stat().st_size
    if remove:
        lacking.unlink()
    else:
        os.truncate(lacking, size - 1)
    succeed(*options(project, run, train_iters=4))
    [passed] = events(run, "passed_over")
    problem = "is missing" if remove else f"has {size - 1:,} bytes instead of {size:,}"
    assert passed["problem"] == f"{lacking.name} {problem}"
    assert events(run, "resume")[0]["iteration"] == 3


def with_a_terminal() -> None:
    """Undoes, in a process that begins, what nohup may have done to these tests."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])


def test_a_run_whose_terminal_is_gone_saves(project: Project, tmp_path: Path) -> None:
    """First nobody reads its log any more, then SIGHUP comes."""
    run = tmp_path / "run"
    words = map(str, options(project, run, train_iters=100_000, save_interval=None))
    command = [sys.executable, "-m", "glm3cli", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=with_a_terminal)
    try:
        assert process.stderr is not None
        process.stderr.close()
        wait_until(lambda: has_steps(run, 2), process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 143
    finally:
        process.kill()
    last = steps(run)[-1]["iteration"]
    assert checkpoints(run) == [f"iter_{last:07d}"]


def test_a_launcher_answers_signals_as_a_single_process_does(
    project: Project, tmp_path: Path
) -> None:
    """Nohup outlives the terminal, SIGUSR1 saves and goes on, and SIGTERM ends after a save."""
    run, log = tmp_path / "run", tmp_path / "log"
    changes = {"train_iters": 100_000, "save_interval": None, "nproc": 2, "tp": 2}
    words = map(str, options(project, run, **changes))
    program = "import os,signal,sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    program += "os.execv(sys.executable, [sys.executable, '-m', 'glm3cli', *sys.argv[1:]])"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=file)
    wait_until(lambda: has_steps(run, 1), process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: checkpoints(run), process)
    [saved] = checkpoints(run)
    wait_until(lambda: has_steps(run, int(saved.removeprefix("iter_")) + 3), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, log.read_text()
    assert len(checkpoints(run)) == 2


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(run: Path, project: Project) -> None:
    for name in ("iter_0000003", "iter_0000006"):
        file = weights_of(run / name)
        os.truncate(file, file.stat().st_size - 1)
    ended = call(*options(project, run))
    assert ended.code == 3
    assert "error: no checkpoint is whole: " in ended.err
    assert "bytes instead of" in ended.err


def test_a_file_that_cannot_be_written_leaves_the_checkpoints_before(
    run: Path, project: Project
) -> None:
    """The size of files is limited, in place of a disk that is full."""
    limit = weights_of(run / "iter_0000006").stat().st_size // 2
    command = [str(word) for word in options(project, run, train_iters=7)]
    done = subprocess.run(
        [sys.executable, "-m", "glm3cli", *command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    assert f"error: {run} can't be written: " in done.stderr
    assert checkpoints(run) == ["iter_0000003", "iter_0000006"]
    succeed(*options(project, run, train_iters=7))
    assert events(run, "resume")[-1]["iteration"] == 6
    assert not list(run.glob(".iter_*"))


def test_usr1_saves_and_goes_on_and_nobody_else_may_write_there(
    project: Project, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    endless = options(project, run, train_iters=100_000, save_interval=None)
    process = start(log, *endless)
    wait_until(lambda: has_steps(run, 2), process)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: checkpoints(run), process)
    [name] = checkpoints(run)
    wait_until(lambda: has_steps(run, int(name.removeprefix("iter_")) + 2), process)
    second = call(*endless)
    assert second.code == 2
    assert f"error: --save {run}: another run is writing there (process " in second.err
    process.send_signal(signal.SIGTERM)
    assert end(process, log).code == 143
    assert len(checkpoints(run)) == 2


def test_the_end_of_its_time_saves(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"train_iters": 100_000, "save_interval": None, "exit_duration": 0.05}
    ended = call(*options(project, run, **changes))
    assert ended.code == 143
    last = steps(run)[-1]["iteration"]
    assert checkpoints(run) == [f"iter_{last:07d}"]
    assert events(run, "signal")[0]["name"] == "--exit-duration"
    assert "stopped by --exit-duration" in (run / "report.html").read_text("utf-8")


def test_a_signal_in_validation_saves(project: Project, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    changes = {"eval_interval": 2, "eval_iters": 50_000, "save_interval": None}
    process = start(log, *options(project, run, **changes))
    wait_until(lambda: has_steps(run, 2), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    ended = end(process, log)
    assert ended.code == 143, ended.err
    assert checkpoints(run) == ["iter_0000002"]


@pytest.mark.parametrize(
    ("name", "more"),
    [("pretrain", {}), ("finetune", {"lora_rank": 4, "lora_dropout": 0.1, "lr": 1e-2})],
    ids=["pretrain", "LoRA"],
)
def test_kill_9_at_random_moments(
    project: Project, tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    """A killed run ends with the loss of one that was not; kill_training.py kills it more often."""
    changes = {"save_interval": 3, "train_iters": 30, "keep_last": 2, **more}
    succeed(*options(project, tmp_path / "whole", name, **changes))
    command = options(project, tmp_path / "killed", name, **changes)
    kills = kill_at_random(command, tmp_path / "killed/metrics.jsonl", kills=3, longest=0.8, seed=1)
    assert kills  # fewer than three where the machine is so quick that the run has ended
    assert losses(tmp_path / "killed")[-1] == losses(tmp_path / "whole")[-1]
