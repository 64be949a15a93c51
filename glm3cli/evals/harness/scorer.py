"""Answers the requests of lm-evaluation-harness with our inference engine.

This module doesn't import lm-evaluation-harness: a request is the tuple of its arguments. Every
rank receives all requests and returns all results; the data parallel ranks share the work between
them. Requests that begin alike are answered side by side, so that their beginning is read once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.evals.harness.options import decoding_of
from glm3cli.evals.harness.template import token_ids
from glm3cli.evals.spread import Batch, batches_in_order, spread
from glm3cli.infer.decoding.stops import StopTexts
from glm3cli.infer.engine import Engine
from glm3cli.infer.model import stop_ids

# Answers are given out in portions of so many batches: the fewer, the more often rows are idle.
_BATCHES_OF_A_PORTION = 4

Result = TypeVar("Result")
# The arguments of a request: (context, continuation) for `loglikelihood`, (text,) for
# `loglikelihood_rolling`, and (context, generation options) for `generate_until`.
Request = tuple[Any, ...]
# Gets the results that have just come, by the positions of their requests.
OnResults = Callable[[Mapping[int, Any]], None]


def ignore(_found: Mapping[int, Any]) -> None:
    """What is called with results where nobody wants them as they come."""


@dataclass(frozen=True)
class Scored:
    """One sequence to score: the log-probability of its continuation after its context.

    Attributes:
        context: Token ids that the model reads first; they begin with `[gMASK] sop`.
        continuation: Token ids whose log-probabilities are summed.
    """

    context: list[int]
    continuation: list[int]


class Scorer:
    """Answers the three kinds of requests that lm-evaluation-harness has for a model."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, batch_size: int) -> None:
        """Takes an engine.

        Args:
            engine: This rank's part of the model.
            tokenizer: The model's tokenizer.
            batch_size: Most requests that one model copy answers at once.
        """
        engine.limit(batch_size)
        self._engine = engine
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._prefix = list(tokenizer.prefix)
        # Most tokens of a request beside the prefix. (The last one is predicted and not read, so
        # that the model could take one more.)
        self._room = engine.model.seq_length - len(self._prefix)

    def loglikelihood(
        self, requests: Sequence[Request], on_results: OnResults = ignore
    ) -> list[tuple[float, bool]]:
        """Returns, for each request, (log-probability, whether greedy decoding gives it).

        The log-probability is the sum over the continuation's tokens, in nats. A context that is
        too long loses its beginning.
        """
        rows = [self._split(*request) for request in requests]
        asked = [i for i, row in enumerate(rows) if row.continuation]
        # An empty continuation follows with probability 1.
        found = {i: (0.0, True) for i, row in enumerate(rows) if not row.continuation}
        on_results(found)
        for scores in self._score([rows[i] for i in asked]):
            new = {asked[place]: score for place, score in scores.items()}
            found |= new
            on_results(new)
        return [found[i] for i in range(len(rows))]

    def loglikelihood_rolling(
        self, requests: Sequence[Request], on_results: OnResults = ignore
    ) -> list[float]:
        """Returns the log-probability of each request's whole text, in nats.

        A text that is longer than the model's sequences is scored in the windows of `windows`.
        """
        rows: list[Scored] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(requests):
            for context, continuation in windows(self._encode(text), self._room):
                rows.append(Scored([*self._prefix, *context], continuation))
                owners.append(owner)
        totals, left = [0.0] * len(requests), Counter(owners)
        for scores in self._score(rows):
            for place, (score, _) in scores.items():
                totals[owners[place]] += score
            left.subtract(owners[place] for place in scores)
            done = {owners[place] for place in scores if not left[owners[place]]}
            on_results({owner: totals[owner] for owner in done})
        return totals

    def generate_until(
        self, requests: Sequence[Request], on_results: OnResults = ignore
    ) -> list[str]:
        """Returns the generated continuation of each request's context.

        A continuation ends before the first stop string (`until`), at an end token, or after
        `max_gen_toks` tokens. A context that leaves no room for these loses its beginning.

        Raises:
            ConfigError: A task asks for a generation option that we don't have.
        """
        rules = [decoding_of(options) for _, options in requests]
        prompts = []
        for (context, _), rule in zip(requests, rules, strict=True):
            room = max(1, self._room - rule.max_new_tokens)
            prompts.append([*self._prefix, *self._encode(context)[-room:]])
        ends = stop_ids(self._tokenizer)

        def begin(batch: Batch) -> Callable[[], list[str]]:
            def answers() -> list[str]:
                asked = [
                    request
                    for i in batch.members
                    for request in rules[i].requests(prompts[i], self._tokenizer, ends, seed=i)
                ]
                said = self._engine.answer(asked)
                return [
                    StopTexts(self._tokenizer, rules[i].stops).cut(
                        self._tokenizer.decode(one.token_ids)
                    )
                    for i, one in zip(batch.members, said, strict=True)
                ]

            return answers

        order = sorted(range(len(prompts)), key=lambda i: prompts[i])
        size = self._batch_size * _BATCHES_OF_A_PORTION
        portions = [order[start : start + size] for start in range(0, len(order), size)]
        stretches = [[Batch(tuple(members), len(members))] for members in portions]
        found: dict[int, str] = {}
        for new in spread(self._engine.grid, stretches, begin):
            found |= new
            on_results(new)
        return [found[i] for i in range(len(requests))]

    def _encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, in which the names of roles are their tokens."""
        return token_ids(self._tokenizer, text)

    def _split(self, context: str, continuation: str) -> Scored:
        """Encodes context and continuation together and cuts the ids where the context ends."""
        # Spaces at the border belong to the continuation: the tokenizer joins them to its words.
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole = self._encode(bare + continuation)
        cut = min(len(self._encode(bare)), len(whole) - 1) if bare else 0
        # A context that is too long loses its beginning.
        start = max(0, min(cut, len(whole) - self._room))
        return Scored([*self._prefix, *whole[start:cut]], whole[cut:])

    def _score(self, rows: Sequence[Scored]) -> Iterator[dict[int, tuple[float, bool]]]:
        """Yields the scores of rows as they come, by the rows' positions."""

        def begin(batch: Batch) -> Callable[[], list[tuple[float, bool]]]:
            asked = [rows[i] for i in batch.members]
            return self._engine.ask_continuations(
                [row.context for row in asked], [row.continuation for row in asked]
            )

        texts = [[*row.context, *row.continuation] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: texts[i])
        batches = batches_in_order(order, texts, self._batch_size)
        yield from spread(self._engine.grid, [[one] for one in batches], begin)


def windows(tokens: Sequence[int], size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts the token ids of a long text into windows of at most `size` tokens.

    Yields (context, tokens to score) for each window. Each token is scored once; every window but
    the first has at least one token of context, and the last one as many as fit.
    """
    if tokens:
        yield [], list(tokens[:size])
    done = size
    while done < len(tokens):
        end = min(len(tokens), done + size - 1)
        yield list(tokens[end - size : done]), list(tokens[done:end])
        done = end
