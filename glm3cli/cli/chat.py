"""The terminal of `glm3 generate --chat`: reads lines with an editor, and shows answers.

Answers go to stdout, and remarks to stderr, so that a chat can also be held by pipes: without a
terminal there is no prompt, and each line of stdin is a turn.
"""

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import typer

PROMPT, RESULT_PROMPT, MORE_PROMPT = "you> ", "result> ", "...> "
_QUOTES = '"""'
_HISTORY_LENGTH = 1000  # lines


class ChatTerminal:
    """Reads a chat from stdin, and writes it to stdout and stderr."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._is_open = self._is_stopped = False
        self._history: Path | None = None  # of lines that are read by an editor
        # Half surrogates give bytes away that can't be decoded; question marks wouldn't.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")

    def read(self, is_observation: bool) -> str | None:
        """Returns what the user says next; None at the end.

        A line that ends with a backslash goes on in the next one, and so does a line that begins
        with three quotation marks, until three others.

        Args:
            is_observation: Whether the user is asked what a tool has returned.

        Raises:
            KeyboardInterrupt: The user has dropped the line by Ctrl-C.
        """
        line = self._line(RESULT_PROMPT if is_observation else PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(_QUOTES):
            return self._quoted(line.lstrip().removeprefix(_QUOTES))
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line.removesuffix("\\"))
            line = self._line(MORE_PROMPT)
        return "\n".join([*lines, line or ""])

    def _quoted(self, line: str | None) -> str:
        """Returns the lines until three quotation marks, or until the end."""
        lines = []
        while line is not None and not line.rstrip().endswith(_QUOTES):
            lines.append(line)
            line = self._line(MORE_PROMPT)
        return "\n".join([*lines, (line or "").rstrip().removesuffix(_QUOTES)]).strip("\n")

    def _line(self, prompt: str) -> str | None:
        """Returns the next line that can be decoded; None at the end."""
        self._open()
        while True:
            try:
                line = input(prompt if self._is_terminal else "")
                line.encode()
                if self._history is not None:
                    _remember(self._history)
                return line.removesuffix("\r")
            except EOFError:
                if self._is_terminal:
                    typer.echo()
                return None
            except KeyboardInterrupt:
                if not self._is_terminal:
                    return None
                typer.echo()
                raise
            except UnicodeError:
                self.note("error: the line is no valid text, and was left out")

    def _open(self) -> None:
        """Prepares a terminal before its first line is read."""
        if self._is_open or not self._is_terminal:
            return
        self._is_open = True
        self.note("/help lists what can be typed")
        if importlib.util.find_spec("readline"):
            self._history = _history_file()
            _edit_lines(self._history)

    def write(self, text: str) -> None:
        """Shows a piece of an answer at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Shows a remark of the program."""
        typer.secho(text, err=True, dim=True)

    def show_call(self, text: str) -> None:
        """Shows the call of a tool."""
        typer.secho(text, fg="cyan")

    def is_stopped(self) -> bool:
        """Whether Ctrl-C was pressed since the answer began."""
        return self._is_stopped

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within the block, Ctrl-C makes `is_stopped` true and raises nothing."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            self._is_stopped = True

        self._is_stopped = False
        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _edit_lines(history: Path) -> None:
    """Gives `input` an editor, with the lines of earlier chats and completion of commands."""
    import readline

    readline.set_history_length(_HISTORY_LENGTH)
    with contextlib.suppress(OSError):  # there is none yet, or it can't be read
        readline.read_history_file(history)
    readline.set_completer_delims("")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter puts in a line break


def _complete(text: str, index: int) -> str | None:
    """Returns the command number `index` that begins with `text`, for readline."""
    from glm3cli.infer.chat.session import COMMANDS

    known = [f"/{name}" for name in COMMANDS if f"/{name}".startswith(text)]
    return known[index] if text and index < len(known) else None


def _remember(history: Path) -> None:
    """Writes the lines that were typed, for later chats, where the user alone can read them."""
    import readline

    with contextlib.suppress(OSError):  # a home that can't be written must not end the chat
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.write_history_file(history)


def _history_file() -> Path:
    """Returns the file of typed lines (source: XDG Base Directory Specification)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "glm3/chat_history"
