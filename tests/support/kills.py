"""Kills a command of the program again and again while it works, until it has ended by itself."""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def kill_at_random(
    command: Sequence[Any], file: Path, *, kills: int, longest: float, seed: int
) -> int:
    """Runs a command again and again; gives how often it was killed while it worked.

    Args:
        command: What follows `glm3`; it goes on where it was killed.
        file: The file that grows while it works, such as RUN/metrics.jsonl.
        kills: Number of times to kill it, with all processes that it has started.
        longest: Seconds from the first growth to a kill, at most.
        seed: Of the moments.
    """
    moments, done = random.Random(seed), 0
    arguments = [sys.executable, "-m", "glm3cli", *(str(word) for word in command)]
    while True:
        before = _size(file)
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log)
            if done < kills:
                while process.poll() is None and _size(file) <= before:
                    time.sleep(0.002)
                time.sleep(moments.uniform(0, longest))
            if done < kills and process.poll() is None:
                process.kill()
                process.wait()
                done += 1
                continue
            if process.wait():
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"exit code {process.returncode}: {said}")
            return done


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
