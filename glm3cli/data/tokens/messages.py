"""The turns of a conversation, the tools that are called in it, and the samples made of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from glm3cli.errors import DataError

Role = Literal["system", "user", "assistant", "observation"]

ROLES: tuple[Role, ...] = get_args(Role)
# The label of a token that isn't trained (the default of torch's cross_entropy).
IGNORED_LABEL = -100


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model asks to be called.

    Attributes:
        name: The name of the tool.
        arguments: The arguments by their names, as JSON values.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said.
        metadata: The name of the tool that an assistant turn calls; "" for none.
        tools: The tools that a system turn offers to the model, as JSON values; None for none.
        loss: Whether an assistant turn is trained.
        arguments: The arguments of the call that an assistant turn is, if its content is still to
            be written, which each chat format does in its own way; else None.
    """

    role: Role
    content: str
    metadata: str = ""
    tools: Any = None
    loss: bool = True
    arguments: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, turn: Mapping[str, Any]) -> "Message":
        """Reads a turn in ChatGLM3's own form: role, content, optional metadata, tools and loss.

        Raises:
            DataError: The role is unknown or the content isn't a string.
        """
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise DataError(f"role {role!r} is unknown", f"use {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"content of a {role} turn is {content!r}", "it must be a string")
        return cls(
            role,
            content,
            turn.get("metadata") or "",
            turn.get("tools"),
            turn.get("loss") is not False,
        )


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Attributes:
        input_ids: The token ids.
        labels: For each position, its own id if it is trained, else IGNORED_LABEL. The labels
            aren't shifted: the token before a position predicts its label.
    """

    input_ids: list[int]
    labels: list[int]


def system_turn(content: str, tools: Any) -> Message | None:
    """Returns the turn with which a conversation begins, for training and generation alike.

    Args:
        content: The system text; in front of tools, an empty one stands for the text that the
            model was trained on there.
        tools: The tools that the model may call, as JSON values; none if it is None or empty.

    Returns:
        The turn; None if there is neither a text nor a tool.
    """
    if not content and not tools:
        return None
    return Message("system", content, tools=tools or None)
