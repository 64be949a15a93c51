"""The answer to /v1/completions: texts that are continued, maybe with their prompts."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from glm3cli.infer.serve.orders import Score, Token, Update
from glm3cli.infer.serve.protocol.answer import Answer, Served
from glm3cli.infer.serve.protocol.asked import Asked, Prompt, Reader
from glm3cli.infer.serve.protocol.bodies import CompletionBody
from glm3cli.infer.serve.protocol.choices import Piece
from glm3cli.infer.serve.protocol.errors import ServerError
from glm3cli.infer.serve.protocol.logprobs import of_completion


class CompletionAnswer(Answer):
    """The choices of a completion; those of the first prompt come first.

    With `echo` a choice begins with its prompt, whose tokens are scored if log-probabilities are
    wanted: that of the first token, which none comes before, is null.
    """

    _prefix = "cmpl"
    _object = _chunk = "text_completion"

    def __init__(self, reader: Reader, asked: Asked, body: CompletionBody, model: Served) -> None:
        """Begins a completion; see `Answer`."""
        super().__init__(reader, asked, body, model)
        self._count = body.logprobs
        self._echoes = body.echo
        # The choices for which the engine makes tokens, by the places of their orders.
        self._made = [
            index
            for index in range(len(self._choices))
            if asked.decodings[index // asked.num_choices].max_new_tokens
        ]
        self._offsets = [0] * len(self._choices)
        self._held: dict[int, Piece] = {}  # what comes before its prompt is scored
        if body.echo and body.logprobs is not None:
            self._held = {index: Piece() for index in range(len(self._choices))}
            self.makers += [
                partial(_score, prompt, body.logprobs, model.adapter) for prompt in asked.prompts
            ]

    def first(self) -> Iterator[tuple[int, Piece]]:
        """Yields the prompts that aren't scored, and the end of choices without tokens."""
        for index in range(len(self._choices)):
            if index in self._held:
                continue
            text = self._prompt_text(index) if self._echoes else ""
            yield index, Piece(text, finish=None if index in self._made else "length")

    def take(self, place: int, update: Update) -> Iterator[tuple[int, Piece]]:
        """Takes an update of a choice, or the scores of a prompt."""
        if place >= len(self._made):
            yield from self._scored(place - len(self._made), update)
            return
        index = self._made[place]
        piece = self._choices[index].take(update)
        if index in self._held:
            self._held[index] += piece
        elif piece:
            yield index, piece

    def _scored(self, number: int, update: Update) -> Iterator[tuple[int, Piece]]:
        """Yields the choices of a prompt that has been scored."""
        if update.problem:
            raise ServerError(update.problem)
        tokens = update.tokens[self._asked.prompts[number].num_hidden :]
        tokens = [*(Token(first.id) for first in tokens[:1]), *tokens[1:]]
        for index in range(len(self._choices)):
            if index // self._asked.num_choices == number:
                finish = None if index in self._made else "length"
                piece = Piece(self._prompt_text(index), tokens=tokens, finish=finish)
                yield index, piece + self._held.pop(index)

    def _prompt_text(self, index: int) -> str:
        """Returns the text of the prompt of a choice."""
        prompt = self._asked.prompts[index // self._asked.num_choices]
        return self._tokenizer.decode(prompt.ids[prompt.num_hidden :])

    def _deltas(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yields a part of a choice, if there is anything in it."""
        if piece:
            yield self._choice(index, piece)

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns a choice, or a part of it."""
        logprobs = None
        if self._count is not None:
            offset = self._offsets[index]
            logprobs = of_completion(self._tokenizer, piece.tokens, self._count, offset)
            self._offsets[index] += len(piece.text)
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish,
        }


def _score(prompt: Prompt, count: int, adapter: str | None, number: int) -> Score:
    """Returns the order that scores a prompt."""
    return Score(number, prompt.ids, count, adapter)
