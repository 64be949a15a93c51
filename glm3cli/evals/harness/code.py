"""Runs the code that a model has written, for tasks such as HumanEval: --run-code.

Each program runs in a process of its own, in an empty folder that is removed, with limits on time,
memory, files and processes, and without a network: the kernel refuses it sockets (seccomp). That
keeps accidents away, not attackers; a container does more.
"""

import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import comb
from pathlib import Path
from typing import Any

from glm3cli.errors import ConfigError, DeviceError
from glm3cli.evals.harness.confined import SECONDS

# A program of its own, so that nothing runs between the fork and the start of another process.
_CONFINED = Path(__file__).with_name("confined.py")


def check_can_run() -> None:
    """Checks that code can be kept from the network here.

    Raises:
        DeviceError: It can't.
    """
    done = _run("import socket\ntry:\n socket.socket()\nexcept OSError: raise SystemExit(7)")
    if done != 7:
        raise DeviceError(
            "--run-code: this machine can't keep a process from the network "
            f"({platform.system()} {platform.machine()}; it needs Linux with seccomp)",
            "leave such tasks out, or evaluate on another machine",
        )


def passes(program: str) -> bool:
    """Returns whether a program ends by itself, without an error, within its limits."""
    return _run(program) == 0


class CodeEval:
    """The metric `code_eval` of the package evaluate, which otherwise comes from the network."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        **_more: Any,
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Returns pass@k (Chen et al. 2021), and which candidates of each task have passed.

        Args:
            references: The tests of each task.
            predictions: The candidates for each.
            k: The numbers of candidates of which one has to pass.
        """
        programs = [
            f"{candidate}\n{tests}"
            for tests, candidates in zip(references, predictions, strict=True)
            for candidate in candidates
        ]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
            found = iter(list(pool.map(passes, programs)))
        passed = [[next(found) for _ in candidates] for candidates in predictions]
        rates = {
            f"pass@{n}": sum(_pass_at(n, one) for one in passed) / len(passed)
            for n in k
            if all(len(one) >= n for one in passed)
        }
        return rates, dict(enumerate(passed))


@contextmanager
def code_is_run(is_allowed: bool) -> Iterator[None]:
    """Gives tasks that are loaded in a block our metric where they ask for `code_eval`.

    Args:
        is_allowed: Whether code may be run; if not, such a task is refused.
    """
    import evaluate

    original = evaluate.load

    def load(path: str, *given: Any, **more: Any) -> Any:
        if path != "code_eval":
            return original(path, *given, **more)
        if not is_allowed:
            raise not_allowed("a task of --tasks")
        return CodeEval()

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original


def not_allowed(task: str) -> ConfigError:
    """Returns the error for a task that runs code without being allowed to."""
    return ConfigError(
        f"{task} runs code that the model writes",
        "allow it by --run-code: in processes with limits and no network; or leave the task out",
    )


def _pass_at(k: int, passed: Sequence[bool]) -> float:
    """Returns the chance that one of k candidates, drawn among all, passes."""
    total, wrong = len(passed), passed.count(False)
    return 1.0 - comb(wrong, k) / comb(total, k)


def _run(program: str) -> int | None:
    """Runs a program; returns its exit status, or None if it took too long."""
    with tempfile.TemporaryDirectory(prefix="glm3-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_CONFINED)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(program.encode("utf-8", "replace"), SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process.pid)
            process.wait()
    return process.returncode


def _end_group(pid: int) -> None:
    """Ends a program with the processes that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
