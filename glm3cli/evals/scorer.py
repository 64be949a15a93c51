"""Answers the requests of lm-evaluation-harness with our inference engine.

This module doesn't import lm-evaluation-harness: a request is any object that has its arguments in
`args`. Every rank receives all requests and returns all results; the data parallel ranks share the
work between them.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.evals.spread import batches_by_length, spread
from glm3cli.infer.decoding.stops import StopTexts
from glm3cli.infer.engine import Engine
from glm3cli.infer.model import stop_ids
from glm3cli.infer.requests import Request
from glm3cli.infer.sampling import Sampling

# lm-evaluation-harness's own default for tasks that don't say how long an answer may be.
_MAX_NEW_TOKENS = 256
# A document is scored at every position, and the logits of one may already fill the memory.
_ROLLING_BATCH_SIZE = 1

Result = TypeVar("Result")


class HarnessRequest(Protocol):
    """One request, as lm-evaluation-harness passes it (its `Instance` fits).

    Attributes:
        args: (context, continuation) for `loglikelihood`, (text,) for `loglikelihood_rolling`,
            and (context, generation options) for `generate_until`.
    """

    args: tuple[Any, ...]


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
    """Implements the three methods that lm-evaluation-harness calls on a model.

    It is mixed with `lm_eval.api.model.LM` (see `harness`), so that it needs no import of it.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, batch_size: int) -> None:
        super().__init__()
        self._engine = engine
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._prefix = list(tokenizer.prefix)
        # Most tokens of a request beside the prefix. (The last one is predicted and not read, so
        # that the model could take one more.)
        self._room = engine.model.seq_length - len(self._prefix)

    def loglikelihood(self, requests: Sequence[HarnessRequest]) -> list[tuple[float, bool]]:
        """Returns, for each request, (log-probability, whether greedy decoding gives it).

        The log-probability is the sum over the continuation's tokens, in nats. A context that is
        too long loses its beginning.
        """
        rows = [self._split(*request.args) for request in requests]
        asked = [i for i, row in enumerate(rows) if row.continuation]
        scores = self._score([rows[i] for i in asked], self._batch_size)
        found = dict(zip(asked, scores, strict=True))
        # An empty continuation follows with probability 1.
        return [found.get(i, (0.0, True)) for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: Sequence[HarnessRequest]) -> list[float]:
        """Returns the log-probability of each request's whole text, in nats.

        A text that is longer than the model's sequences is scored in the windows of `windows`.
        """
        rows: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for context, continuation in windows(
                self._tokenizer.encode(request.args[0]), self._room
            ):
                rows.append(Scored([*self._prefix, *context], continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._score(rows, _ROLLING_BATCH_SIZE)
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[HarnessRequest]) -> list[str]:
        """Returns the generated continuation of each request's context.

        A continuation ends before the first stop string (`until`), at an end token, or after
        `max_gen_toks` tokens.
        """
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        texts: dict[int, str] = {}
        for members in groups.values():
            contexts = [requests[i].args[0] for i in members]
            generated = self._generate(contexts, requests[members[0]].args[1])
            texts.update(zip(members, generated, strict=True))
        return [texts[i] for i in range(len(requests))]

    def _split(self, context: str, continuation: str) -> Scored:
        """Encodes context and continuation together and cuts the ids where the context ends."""
        # Spaces at the border belong to the continuation: the tokenizer joins them to its words.
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole = self._tokenizer.encode(bare + continuation)
        cut = min(len(self._tokenizer.encode(bare)), len(whole) - 1) if bare else 0
        # A context that is too long loses its beginning.
        start = max(0, min(cut, len(whole) - self._room))
        return Scored([*self._prefix, *whole[start:cut]], whole[cut:])

    def _score(self, rows: Sequence[Scored], batch_size: int) -> list[tuple[float, bool]]:
        def run(batch: list[int]) -> list[tuple[float, bool]]:
            contexts = [rows[i].context for i in batch]
            return self._engine.continuation_logprobs(
                contexts, [rows[i].continuation for i in batch]
            )

        lengths = [len(row.context) + len(row.continuation) for row in rows]
        return self._run_all(lengths, batch_size, run)

    def _generate(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        max_new_tokens = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        room = max(1, self._room - max_new_tokens)
        prompts = [[*self._prefix, *self._tokenizer.encode(text)[-room:]] for text in contexts]
        until = options.get("until") or []
        sampling, ends = sampling_of(options), stop_ids(self._tokenizer)
        stops = StopTexts(self._tokenizer, [until] if isinstance(until, str) else list(until))

        def run(batch: list[int]) -> list[str]:
            # No two prompts of a run draw from the same generator.
            seed = batch[0] * self._batch_size
            found = self._engine.answer(
                [
                    Request(prompts[i], sampling, max_new_tokens, ends, seed + row, stops.is_end)
                    for row, i in enumerate(batch)
                ]
            )
            return [stops.cut(self._tokenizer.decode(one.token_ids)) for one in found]

        return self._run_all([len(prompt) for prompt in prompts], self._batch_size, run)

    def _run_all(
        self, lengths: Sequence[int], batch_size: int, run: Callable[[list[int]], list[Result]]
    ) -> list[Result]:
        """Shares batches of items among the data parallel ranks; results in the items' order.

        Args:
            lengths: The length of each item, in tokens.
            batch_size: Most items of one batch.
            run: Takes the positions of a batch's items and returns one result for each.
        """
        batches = batches_by_length(range(len(lengths)), lengths, batch_size)
        order = [i for batch in batches for i in batch]
        outputs = [
            output
            for results in spread(self._engine.grid, batches, run)
            for result in results
            for output in result
        ]
        found = dict(zip(order, outputs, strict=True))
        return [found[i] for i in range(len(lengths))]


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


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Converts a task's generation options, named as in transformers, to those of our engine.

    Decoding is greedy unless the temperature is above 0 and `do_sample` isn't false.
    """
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0) or temperature == 0.0:
        return Sampling(greedy=True)
    return Sampling(
        greedy=False,
        temperature=temperature,
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
    )
