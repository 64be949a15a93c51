"""`Conversation`: the turns of a chat, in memory and in a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.tokens.formats.base import ChatFormat
from glm3cli.data.tokens.formats.table import FORMATS
from glm3cli.data.tokens.messages import Message, Role, ToolCall, system_turn
from glm3cli.errors import DataError
from glm3cli.host import parsing
from glm3cli.host.files import write_text


@dataclass
class Conversation:
    """The turns of a chat.

    Attributes:
        system: The system text; "" for none.
        tools: The tools that the model may call, as JSON values; None for none.
        turns: The turns after the system's.
        chat: How the model's turns are written, and its calls.
    """

    system: str = ""
    tools: Any = None
    turns: list[Message] = field(default_factory=list)
    chat: ChatFormat = FORMATS["chatglm3"]

    @property
    def messages(self) -> list[Message]:
        """All turns, the system's first if there is one."""
        turn = system_turn(self.system, self.tools)
        return [turn, *self.turns] if turn else list(self.turns)

    @property
    def calls(self) -> list[ToolCall]:
        """The tool calls of the last turn; none if it is a text."""
        return self.chat.read_calls(self.turns[-1]) if self.turns else []

    def say(self, text: str) -> None:
        """Adds a turn: what a tool has returned if the last turn calls one, else the user's."""
        role: Role = "observation" if self.calls else "user"
        self.turns.append(Message(role, text))

    def add(self, answer: Sequence[Message]) -> None:
        """Adds the turns of an answer."""
        self.turns += answer

    def take_back(self) -> Message | None:
        """Removes the last turn that the model has answered, and all after it.

        Returns:
            The removed turn; None if there is none.
        """
        for index in reversed(range(len(self.turns))):
            if self.turns[index].role in ("user", "observation"):
                turn = self.turns[index]
                del self.turns[index:]
                return turn
        return None

    def save(self, path: Path) -> None:
        """Writes all turns as one JSON line, which `preprocess --handler chat` reads, too.

        Raises:
            DataError: The file can't be written; an older one is unchanged.
        """
        line = json.dumps({"messages": [_to_dict(m) for m in self.messages]}, ensure_ascii=False)
        try:
            write_text(path, line + "\n")
        except (OSError, ValueError) as error:  # the latter for a null byte
            raise DataError(f"{path} can't be written: {error}", "give another file") from None

    def load(self, path: Path) -> None:
        """Replaces all turns by those of a file, in ChatGLM3's or OpenAI's form.

        Raises:
            DataError: The file can't be read, or holds no conversation; nothing has changed.
        """
        value = read_json(path, "a conversation")
        try:
            messages = rows.openai(value if isinstance(value, dict) else {"messages": value})
        except RowError as error:
            raise DataError(f"{path}: {error}", 'write {"messages": [...]}') from None
        first = messages[0] if messages[0].role == "system" else Message("system", "")
        self.system, self.tools = first.content, first.tools
        turns = messages[1:] if first is messages[0] else messages
        self.turns = [replace(one, content=self.chat.text(one), arguments=None) for one in turns]


def read_json(path: Path, what: str) -> Any:
    """Returns the JSON value in a UTF-8 file, which may begin with a byte-order mark.

    Args:
        path: The file.
        what: What the file should hold, for the error message.

    Raises:
        DataError: The file can't be read, or isn't JSON.
    """
    try:
        return parsing.read_json(path)
    except UnicodeDecodeError as error:
        reason: object = f"byte {error.start:,} is no UTF-8"
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no valid JSON: {error}"
    raise DataError(f"{path}: {reason}", f"give a JSON file of {what}")


def _to_dict(message: Message) -> dict[str, Any]:
    """Returns a turn in ChatGLM3's form."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.metadata:
        turn["metadata"] = message.metadata
    if message.tools is not None:
        turn["tools"] = message.tools
    return turn
