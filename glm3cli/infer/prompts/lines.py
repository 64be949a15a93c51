"""Reads the lines of a prompts file, whose forms are described at `parse_line`."""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm3cli.config.inference import SamplingOptions
from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.tokens.messages import Message
from glm3cli.errors import DataError
from glm3cli.host.parsing import parse_json
from glm3cli.infer.prompts.fields import (
    HINT,
    LineError,
    body_of,
    own_options,
    own_seed,
    unread_in,
)

_BOM = b"\xef\xbb\xbf"
# The columns of a row with what the model may call, and the length of a row's digest.
_TOOLS = ("tools", "functions")
_DIGITS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompts file.

    Attributes:
        number: The number of the line, from 1; empty lines count.
        prompt: The prompt; of a conversation, what the last turn says.
        messages: The turns of a conversation, which is answered; None for a plain prompt.
        sampling: The options for the length of the answer and for how tokens are drawn.
        seed: The seed of the line's own random numbers.
        request: A digest of the whole row, by which --resume knows it again.
        custom_id: What a line of OpenAI's batches is called; None for none.
        unread: The fields that would change the answer, but aren't read.
    """

    number: int
    prompt: str
    messages: list[Message] | None
    sampling: SamplingOptions
    seed: int
    request: str
    custom_id: str | None = None
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadLine:
    """A line that is no prompt.

    Attributes:
        number: The number of the line, from 1.
        problem: What is wrong, with the file and the line.
    """

    number: int
    problem: str


class PromptsFile:
    """The lines of a file up to the size that it has when it is opened.

    Attributes:
        path: The file.
        size: The number of bytes that are read; None for a pipe, which is read to its end.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file.

        Raises:
            DataError: It can't be read.
        """
        self.path = path
        self._unread: dict[str, None] = {}  # what a warning has named
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise DataError(
                f"--prompts-file {path}: {error.strerror}", "give a UTF-8 file"
            ) from None
        status = os.fstat(self._file.fileno())
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None

    def growth(self) -> int:
        """Returns the number of bytes that the file has got since it was opened; 0 for a pipe."""
        return os.fstat(self._file.fileno()).st_size - self.size if self.size is not None else 0

    def read(self, options: SamplingOptions) -> Iterator[PromptLine | BadLine]:
        """Yields the lines that aren't empty, in their order.

        A log line names the fields that would change answers, but aren't read, once for the file.

        Args:
            options: The options that hold for a line unless it has its own. The seed of the n-th
                of the yielded lines, from 0, is the options' plus n.

        Raises:
            DataError: The file has become shorter, or can't be read on.
        """
        general = {key: getattr(options, key) for key in SamplingOptions.model_fields}
        options, count = SamplingOptions.parse(general), 0
        unread: dict[str, None] = {}
        for number, line in enumerate(self._raw(), 1):
            if not line.strip():
                continue
            try:
                found = parse_line(line, number, options, options.seed + count)
                unread |= dict.fromkeys(found.unread)
                yield found
            except LineError as error:
                yield BadLine(number, f"{self.path}:{number} {error.message}")
            count += 1
        if unread.keys() - self._unread.keys():
            self._unread |= unread
            _log.warning("%s: not read here, and without effect: %s", self.path, ", ".join(unread))

    def _raw(self) -> Iterator[bytes]:
        """Yields all lines with their ends, without a byte-order mark at the first one's start."""
        left = self.size
        if left is not None:
            self._file.seek(0)
        is_first = True
        while left is None or left > 0:
            try:
                line = self._file.readline(-1 if left is None else left)
            except OSError as error:
                raise DataError(f"{self.path}: {error.strerror}", "give it again") from None
            if not line:
                if left is None:
                    return
                raise DataError(
                    f"{self.path} has become shorter by {left:,} bytes while it was read",
                    "don't change a file while it is used; --resume goes on where this one stops",
                )
            if left is not None:
                left -= len(line)
            yield line.removeprefix(_BOM) if is_first else line
            is_first = False


def parse_line(line: bytes, number: int, options: SamplingOptions, seed: int) -> PromptLine:
    """Reads a line of a prompts file.

    It is a JSON string, or an object with `prompt`, or one with `messages` in any form that
    training reads, with `tools` (or `functions`) and `system` beside either, and `history` beside a
    prompt; or a line of OpenAI's batches, whose `body` is such an object. Options of sampling, such
    as `max_new_tokens` and `seed`, may stand beside them, also under OpenAI's names.

    Args:
        line: The line, with or without its end.
        number: The number of the line.
        options: The options that hold unless the line has its own.
        seed: The seed that holds unless the line has its own.

    Raises:
        LineError: The line is no UTF-8, no JSON, or has no prompt.
    """
    row = _json(line)
    value, custom_id = body_of({"prompt": row} if isinstance(row, str) else row)
    prompt, messages = value.get("prompt"), None
    if (prompt is None) == (value.get("messages") is None):
        raise LineError("has no prompt" if prompt is None else "has both prompt and messages", HINT)
    if prompt is not None and not isinstance(prompt, str):
        raise LineError("has no prompt: it is no string", HINT)
    if prompt is None or any(value.get(name) for name in (*rows.SYSTEM, *_TOOLS, "history")):
        messages = _conversation(value)
        prompt = messages[-1].content
    # A tool may well return nothing.
    if not prompt and not (messages and messages[-1].role == "observation"):
        raise LineError("has an empty prompt", HINT)
    said = [prompt, *(text for message in messages or () for text in _texts(message))]
    if any(0xD800 <= ord(character) < 0xE000 for text in said for character in text):
        raise LineError("has half of a character (a lone surrogate) in its prompt", "mend the line")
    return PromptLine(
        number,
        prompt,
        messages,
        own_options(options, value),
        own_seed(value, seed),
        request=hashlib.sha256(json.dumps(row).encode()).hexdigest()[:_DIGITS],
        custom_id=custom_id,
        unread=unread_in(value),
    )


def _texts(message: Message) -> tuple[str, ...]:
    """Returns the texts that a turn is written of."""
    values = json.dumps([message.tools, message.arguments], ensure_ascii=False)
    return message.content, message.metadata, values


def _json(line: bytes) -> Any:
    """Returns the JSON value of a line.

    Raises:
        LineError: It is no UTF-8 or no JSON.
    """
    try:
        return parse_json(line.decode())
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
        raise LineError(f"is not UTF-8: {byte}", "write the file in UTF-8") from None
    except ValueError as error:
        cut = "" if line.endswith(b"\n") else "; it has no line break: is it still being written?"
        raise LineError(f"is not valid JSON: {error}{cut}", "mend the line") from None


def _conversation(value: Mapping[str, Any]) -> list[Message]:
    """Returns the turns of a line.

    Raises:
        LineError: They have none of the forms that training reads, or end with the model's.
    """
    try:
        if value.get("messages") is None:
            asked = {name: value.get(name) for name in (*rows.SYSTEM, *_TOOLS, "history")}
            # An answer is what training reads last.
            pair = {"instruction": value["prompt"], "output": ""}
            return rows.alpaca({**asked, **pair}, joined=False)[:-1]
        if value.get("history"):
            raise LineError("has history beside its messages", "put its turns into messages")
        messages = rows.openai(value)
    except RowError as error:
        raise LineError(f"has a wrong conversation: {error}", HINT) from None
    if messages[-1].role not in ("user", "observation"):
        raise LineError(
            f"ends with a turn of the {messages[-1].role}, to which there is no answer",
            "end it with a turn of the user or of a tool",
        )
    return messages
