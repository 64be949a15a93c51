"""Calls of tools as GLM-4 writes them: the tool's name, a line break, and the arguments as JSON.

Source: process_response of GLM-4-9B-Chat's modeling_chatglm.py, and the demos beside it.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from glm3cli.data.tokens.messages import Message, ToolCall
from glm3cli.host.parsing import parse_json

_NAME = re.compile(r"[\w.-]{1,64}")


def call_text(arguments: Mapping[str, Any]) -> str:
    """Returns the content of a turn that calls a tool; the tool's name is the turn's metadata."""
    return json.dumps(arguments, ensure_ascii=False)


def read_calls(message: Message) -> list[ToolCall]:
    """Returns the call that an assistant turn is; none if it is text."""
    name = message.metadata.strip()
    if message.role != "assistant" or not _NAME.fullmatch(name):
        return []
    try:
        arguments = parse_json(message.content)
    except ValueError:
        return []
    return [ToolCall(name, arguments)] if isinstance(arguments, dict) else []


def may_be_call(text: str) -> bool:
    """Returns whether a turn that begins with `text` can still become a call."""
    name, found, content = text.partition("\n")
    if not found:
        return not name.strip() or _NAME.fullmatch(name.strip()) is not None
    opening = content.lstrip()[:1]
    return _NAME.fullmatch(name.strip()) is not None and opening in ("", "{")
