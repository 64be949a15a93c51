"""A program on a pseudo-terminal, as a user has it: keys go in, and what is shown comes out."""

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path
from typing import Self

from tests.support.project import environment

CTRL_C, CTRL_D, UP, ENTER = "\x03", "\x04", "\x1b[A", "\r"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """`glm3` on a terminal of its own, which it controls; a context manager that ends it."""

    def __init__(self, home: Path, *arguments: object) -> None:
        """Starts the program.

        Args:
            home: The user's home, for the history of lines.
            arguments: The arguments of the program.
        """
        program = [sys.executable, "-m", "glm3cli", *map(str, arguments)]
        env = {**environment(), "HOME": str(home), "XDG_STATE_HOME": "", "TERM": "xterm"}
        self.process, self._end = pty.fork()
        if self.process == 0:
            os.execve(program[0], program, env)
        self.shown = ""
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._end)
        if self._code is None:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)

    _code: int | None = None

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def interrupt(self, text: str) -> None:
        """Presses Ctrl-C until `text` is shown.

        Python's readline misses one that comes while it begins to wait for a key.
        """
        for _ in range(20):
            self.type(CTRL_C)
            if self._comes(text, seconds=3):
                break
        self.wait_for(text)

    def wait_for(self, text: str) -> str:
        """Waits until `text` is shown after what was waited for before, and returns all between."""
        assert self._comes(text, seconds=60), f"{text!r} doesn't come after {self.shown!r}"
        end = self.shown.index(text, self._seen) + len(text)
        between, self._seen = self.shown[self._seen : end], end
        return between

    def _comes(self, text: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while text not in self.shown[self._seen :]:
            ready, _, _ = select.select([self._end], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                return False
            self._read()
        return True

    def _read(self) -> None:
        try:
            data = os.read(self._end, 65536)
        except OSError:  # the program has closed its side
            data = b""
        assert data, f"the program has ended after {self.shown!r}"
        self._bytes += data
        # Whole characters alone: a test of ours must see half a one as the terminal would.
        self.shown = _ESCAPES.sub("", self._bytes.decode("utf-8", "replace")).replace("\r\n", "\n")

    _bytes = b""

    def code(self, seconds: float = 60) -> int:
        """Waits until the program has ended, and returns its exit code."""
        deadline = time.monotonic() + seconds
        while self._code is None:
            assert time.monotonic() < deadline, f"the program goes on after {self.shown!r}"
            ready, _, _ = select.select([self._end], [], [], 0.05)
            if ready:
                try:
                    os.read(self._end, 65536)
                except OSError:
                    time.sleep(0.05)
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code
