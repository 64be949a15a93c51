"""Reads the lines of a prompts file, whose forms are described at `parse_line`."""

import json
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
from glm3cli.errors import ConfigError, DataError
from glm3cli.host.parsing import parse_json

_BOM = b"\xef\xbb\xbf"
_HINT = (
    'write {"prompt": "..."}, a JSON string, or {"messages": [...]}; --on-error skip leaves it out'
)


class LineError(DataError):
    """A line that is no prompt."""


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompts file.

    Attributes:
        number: The number of the line, from 1; empty lines count.
        prompt: The prompt; of a conversation, what the last turn says.
        messages: The turns of a conversation, which is answered; None for a plain prompt.
        sampling: The options for the length of the answer and for how tokens are drawn.
        seed: The seed of the line's own random numbers.
    """

    number: int
    prompt: str
    messages: list[Message] | None
    sampling: SamplingOptions
    seed: int


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

        Args:
            options: The options that hold for a line unless it has its own. The seed of the n-th
                of the yielded lines, from 0, is the options' plus n.

        Raises:
            DataError: The file has become shorter, or can't be read on.
        """
        general = {key: getattr(options, key) for key in SamplingOptions.model_fields}
        options, count = SamplingOptions.parse(general), 0
        for number, line in enumerate(self._raw(), 1):
            if not line.strip():
                continue
            try:
                yield parse_line(line, number, options, options.seed + count)
            except LineError as error:
                yield BadLine(number, f"{self.path}:{number} {error.message}")
            count += 1

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
    training reads, with `tools` and `system` beside either. Options of sampling, such as
    `max_new_tokens` and `seed`, may stand beside them; other fields aren't looked at.

    Args:
        line: The line, with or without its end.
        number: The number of the line.
        options: The options that hold unless the line has its own.
        seed: The seed that holds unless the line has its own.

    Raises:
        LineError: The line is no UTF-8, no JSON, or has no prompt.
    """
    value = _json(line)
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict) or (value.get("prompt") is None) == (
        value.get("messages") is None
    ):
        both = isinstance(value, dict) and value.get("prompt") is not None
        raise LineError("has both prompt and messages" if both else "has no prompt", _HINT)
    prompt, messages = value.get("prompt"), None
    if prompt is not None and not isinstance(prompt, str):
        raise LineError("has no prompt: it is no string", _HINT)
    if prompt is None or value.get("system") or value.get("tools"):
        messages = _conversation(value)
        prompt = messages[-1].content
    if not prompt:
        raise LineError("has an empty prompt", _HINT)
    said = [prompt, *(text for message in messages or () for text in _texts(message))]
    if any(0xD800 <= ord(character) < 0xE000 for text in said for character in text):
        raise LineError("has half of a character (a lone surrogate) in its prompt", "mend the line")
    return PromptLine(number, prompt, messages, _own(options, value), _seed(value, seed))


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
    turns = value.get("messages")
    if turns is None:
        turns = [{"role": "user", "content": value["prompt"]}]
    try:
        messages = rows.openai({**value, "messages": turns})
    except RowError as error:
        raise LineError(f"has a wrong conversation: {error}", _HINT) from None
    if messages[-1].role not in ("user", "observation"):
        raise LineError(
            f"ends with a turn of the {messages[-1].role}, to which there is no answer",
            "end it with a turn of the user or of a tool",
        )
    return messages


def _own(options: SamplingOptions, value: Mapping[str, Any]) -> SamplingOptions:
    """Returns the options with those that a line has for itself.

    Raises:
        LineError: One is wrong.
    """
    known = SamplingOptions.model_fields.keys() - {"seed", "num_return_sequences"}
    own = {key: value[key] for key in known if value.get(key) is not None}
    try:
        return SamplingOptions.parse({**options.model_dump(), **own}) if own else options
    except ConfigError as error:
        raise LineError(f"has a wrong option: {error.message}", error.hint) from None


def _seed(value: Mapping[str, Any], seed: int) -> int:
    """Returns the seed that a line has for itself, or else `seed`.

    Raises:
        LineError: The line's own is no whole number from 0.
    """
    own = value.get("seed")
    if own is None:
        return seed
    if not isinstance(own, int) or isinstance(own, bool) or own < 0:
        raise LineError(f"has a wrong option: seed {own!r} is no whole number from 0", _HINT)
    return own
