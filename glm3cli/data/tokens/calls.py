"""Reads the turns of an answer while it still comes, and tells calls of tools from text.

How a call is written depends on the model's chat format (see `formats`).
"""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

from glm3cli.data.tokens.formats.base import ChatFormat
from glm3cli.data.tokens.messages import Message, ToolCall
from glm3cli.data.tokens.tokenizer import Tokenizer


def to_openai(answer: Sequence[Message], chat: ChatFormat) -> dict[str, Any]:
    """Returns an answer as one assistant turn in OpenAI's form, which training reads, too.

    Args:
        answer: The turns of an answer.
        chat: The chat format of the model.

    Returns:
        The turn: `content`, which is None beside calls without text, and `tool_calls` if there are
        any, with their arguments as JSON text.
    """
    calls = [call for message in answer for call in chat.read_calls(message)]
    texts = [m.content if not m.metadata else f"{m.metadata}\n{m.content}" for m in answer]
    text = "\n".join(t for t, m in zip(texts, answer, strict=True) if t and not chat.read_calls(m))
    turn: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for call in calls
        ]
    return turn


class ReplyStream:
    """Turns the tokens of an answer into turns, and gives the text among them as it comes.

    What may become a tool call is held back until it is one, or can't be one any more.

    Attributes:
        calls: The tool calls of the turns that are complete.
        messages: The turns that are complete: one, unless the model has begun another by the token
            `<|assistant|>`, as before a tool call after a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        names: Collection[str] | None = None,
        decoder: Callable[[], Any] | None = None,
    ) -> None:
        """Begins an answer.

        Args:
            tokenizer: The tokenizer.
            names: The tools that may be called; a call of any other one is text. None for all.
            decoder: Returns what decodes the tokens of a turn, with `push` and `finish` as the
                tokenizer's stream decoder has them, which is taken unless another one is given.
        """
        self.messages: list[Message] = []
        self.calls: list[ToolCall] = []
        self._chat = tokenizer.chat
        self._names = names
        self._begin_decoder = decoder or tokenizer.stream_decoder
        separator = self._chat.separator
        self._next = tokenizer.special(separator) if separator else None
        self._has_shown = False
        self._begin()

    def _begin(self) -> None:
        """Begins a turn."""
        self._decoder = self._begin_decoder()
        self._text = ""
        self._num_shown: int | None = None  # None while the turn may become a call

    def push(self, token: int) -> str:
        """Takes one token, and returns the text that has become certain with it."""
        if token == self._next:
            return self._end()
        self._text += self._decoder.push(token)
        if self._num_shown is None and not self._may_be_call():
            self._num_shown = 0
        return self._unshown()

    def finish(self) -> str:
        """Ends the answer, and returns the rest of its text."""
        return self._end()

    def _end(self) -> str:
        """Ends a turn, and returns the rest of its text."""
        self._text += self._decoder.finish()
        message = self._chat.parse(self._text)
        self.messages.append(message)
        calls = self._chat.read_calls(message) if self._is_known(message.metadata.strip()) else []
        self.calls += calls
        if self._num_shown is None and not calls:
            self._num_shown = 0
        rest = self._unshown()
        self._begin()
        return rest

    def _may_be_call(self) -> bool:
        """Returns whether the turn can still become a call of a tool that may be called."""
        name, found, _ = self._text.partition("\n")
        if self._names is not None and name.strip():
            known = any(one.startswith(name.strip()) for one in self._names)
            if not known or (found and name.strip() not in self._names):
                return False
        return self._chat.may_be_call(self._text)

    def _is_known(self, name: str) -> bool:
        """Returns whether a tool may be called."""
        return self._names is None or name in self._names

    def _unshown(self) -> str:
        """Returns what hasn't been shown of a text, without the empty line of metadata."""
        if self._num_shown is None:
            return ""
        text = self._text
        metadata, found, content = text.partition("\n")
        if found and not metadata.strip():
            text = content.lstrip()
        new = text[self._num_shown :]
        if new and self._num_shown == 0 and self._has_shown:
            new = f"\n{new}"  # a text of another turn stands above
        self._num_shown = len(text)
        self._has_shown = self._has_shown or bool(new)
        return new
