"""The answer to /v1/chat/completions: turns of the assistant, which may call tools."""

import json
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

from glm3cli.data.tokens.messages import ToolCall
from glm3cli.infer.serve.protocol.answer import Answer, Served
from glm3cli.infer.serve.protocol.asked import Asked, Reader
from glm3cli.infer.serve.protocol.bodies import ChatBody
from glm3cli.infer.serve.protocol.choices import Piece
from glm3cli.infer.serve.protocol.logprobs import of_chat


class ChatAnswer(Answer):
    """The choices of an answer in a chat."""

    _prefix = "chatcmpl"
    _object, _chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, reader: Reader, asked: Asked, body: ChatBody, model: Served) -> None:
        """Begins an answer; see `Answer`."""
        super().__init__(reader, asked, body, model)
        self._asks_functions = bool(body.functions)  # the older form, in which they answer, too
        self._count = body.top_logprobs if body.logprobs else None
        self._begun: set[int] = set()
        self._num_calls: Counter[int] = Counter()

    def _deltas(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yields the role once, then text, calls, and the end by itself."""
        if index not in self._begun:
            self._begun.add(index)
            yield _delta(index, {"role": "assistant", "content": ""})
        if piece.text or piece.tokens:
            delta = _delta(index, {"content": piece.text})
            yield delta | {"logprobs": self._logprobs(piece)}
        for call in piece.calls:
            number = self._num_calls[index]
            self._num_calls[index] += 1
            whole = _call(call)
            function = whole["function"]
            if self._asks_functions:
                yield _delta(index, {"function_call": function})
                continue
            begun = {**whole, "index": number, "function": {**function, "arguments": ""}}
            yield _delta(index, {"tool_calls": [begun]})
            rest = {"index": number, "function": {"arguments": function["arguments"]}}
            yield _delta(index, {"tool_calls": [rest]})
        if piece.finish:
            yield _delta(index, {}, self._finish(piece))

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns a whole answer."""
        content = piece.text if piece.text or not piece.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        calls = [_call(call) for call in piece.calls]
        if calls and self._asks_functions:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": self._finish(piece),
        }

    def _finish(self, piece: Piece) -> str | None:
        """Returns why an answer has ended, in the words of the form that was asked for."""
        is_call = piece.finish == "tool_calls" and self._asks_functions
        return "function_call" if is_call else piece.finish

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Returns the log-probabilities of a part of an answer; None if they aren't wanted."""
        if self._count is None:
            return None
        return of_chat(self._tokenizer, piece.tokens, self._count)


def _delta(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """Returns the choice of a chunk."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _call(call: ToolCall) -> dict[str, Any]:
    """Returns a tool call, with its arguments as JSON text."""
    # Python's numbers that JSON lacks become null, and halves of characters question marks.
    plain = json.loads(json.dumps(call.arguments), parse_constant=lambda _word: None)
    text = json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace").decode()
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": text},
    }
