"""`Scoring`: log-probabilities of given tokens, by forward passes without a choice.

Rows that begin alike, such as the questions after the same solved examples, are read as the
branches of a tree: what several have in common is read once, and its keys and values are copied.
The rows of the call before are kept, so that the next questions go on from them, too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from glm3cli.device import require_active
from glm3cli.infer.branches import branches_of
from glm3cli.infer.pipeline import Pipeline, not_numbers
from glm3cli.infer.rows import SMALLEST, shared_length
from glm3cli.model.cache import KVCache, Run, bucket
from glm3cli.parallel.groups import Grid

# The most tokens that one forward pass reads: of rows that are longer, as many as fit.
_CHUNK = 4096
# The same where the logits of all of them are wanted, which are many for a large vocabulary.
_SMALL_CHUNK = 512


@dataclass(frozen=True)
class ScoredToken:
    """A given token, and what the model would rather have had in its place.

    Attributes:
        token: The token id.
        logprob: Its log-probability (natural logarithm) after the tokens before it.
        top: The likeliest tokens there, with theirs.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class NextToken:
    """What a model expects after a prompt.

    Attributes:
        logprobs: The log-probabilities (natural logarithms) of the candidates.
        likeliest: The id of the likeliest token of the whole vocabulary.
    """

    logprobs: list[float]
    likeliest: int


@dataclass(frozen=True)
class _Unread:
    """What a call has to read of a row of token ids.

    Attributes:
        row: The index of the row.
        place: The row of the cache that gets its keys and values.
        start: The number of tokens that needn't be read.
        source: The index of the row from which these are copied; None if they are in their place.
        level: The number of rows that must be read before it, one after the other.
    """

    row: int
    place: int
    start: int
    source: int | None
    level: int


class Scoring:
    """Scores token ids with the ranks that share the model, which must call the same methods."""

    def __init__(self, pipeline: Pipeline, grid: Grid) -> None:
        self._pipeline, self._grid = pipeline, grid
        self._device = require_active().torch_device()
        self.forget()

    def forget(self) -> None:
        """Frees the keys and values of the rows that were read last."""
        self._cache: KVCache = self._pipeline.new_cache()
        self._held: dict[int, list[int]] = {}

    @torch.inference_mode()
    def ask_next(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> Callable[[], list[NextToken]]:
        """Begins what `Engine.ask_next` does."""
        count = len(candidates)
        scores = torch.zeros((len(prompts), count + 1), device=self._device)
        wanted = torch.tensor(list(candidates), device=self._device)
        for row, _, logits in self._passes(prompts, [len(prompt) - 1 for prompt in prompts]):
            scores[row, :count] = logits[-1].log_softmax(dim=-1)[wanted]
            scores[row, count] = logits[-1].argmax()  # fp32 has all ids below 2^24
        arriving = self._pipeline.from_last_stage(scores)

        def wait() -> list[NextToken]:
            rows = arriving.wait().tolist()
            return [NextToken(row[:count], int(row[count])) for row in rows]

        return wait

    @torch.inference_mode()
    def ask_continuations(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> Callable[[], list[tuple[float, bool]]]:
        """Begins what `Engine.ask_continuations` does."""
        scores = torch.zeros((len(contexts), 2), device=self._device)
        # One-token answers to a question, such as letters, are scored by reading it once.
        places: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for place, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            if continuation:
                key = len(context) - 1, (*context, *continuation[:-1])
                places.setdefault(key, []).append(place)
        members = list(places.values())
        rows, firsts = [row for _, row in places], [first for first, _ in places]
        for row, start, logits in self._passes(rows, firsts):
            logprobs = logits.log_softmax(dim=-1)
            likeliest = logprobs.argmax(dim=-1)
            done = start - firsts[row]
            for place in members[row]:
                target = list(continuations[place][done : done + len(logits)])
                targets = torch.tensor(target, device=self._device)
                scores[place, 0] += logprobs.gather(1, targets.unsqueeze(1)).sum()
                scores[place, 1] += (likeliest != targets).sum()
        arriving = self._pipeline.from_last_stage(scores)

        def wait() -> list[tuple[float, bool]]:
            found = arriving.wait()
            if found.isnan().any():
                self.forget()  # NaN in a row would pass through the masks of later texts
                raise not_numbers()
            return [(total, misses == 0) for total, misses in found.tolist()]

        return wait

    @torch.inference_mode()
    def token_logprobs(
        self, rows: Sequence[Sequence[int]], count: int, adapter: str | None = None
    ) -> list[list[ScoredToken]]:
        """Computes what `Engine.token_logprobs` does, and forgets what it has read.

        Raises:
            CheckpointError: The logits are NaN.
        """
        targets = [list(row[1:]) for row in rows]
        asked = [index for index, one in enumerate(targets) if one]
        starts = [sum(map(len, targets[:index])) for index in range(len(targets))]
        total = sum(map(len, targets))
        scores = torch.zeros((total, 1 + count), device=self._device)
        ids = torch.zeros((total, count), dtype=torch.int32, device=self._device)
        read = [list(rows[index][:-1]) for index in asked]
        for row, start, logits in self._passes(read, [0] * len(read), _SMALL_CHUNK, adapter):
            first = starts[asked[row]] + start
            own = slice(first, first + len(logits))
            given = targets[asked[row]][start : start + len(logits)]
            whole = logits.logsumexp(dim=-1, keepdim=True)
            wanted = torch.tensor(given, device=self._device).unsqueeze(1)
            top, likeliest = logits.topk(count, dim=-1)
            scores[own] = torch.cat([logits.gather(1, wanted), top], dim=1) - whole
            ids[own] = likeliest.int()
        scores = self._pipeline.from_last_stage(scores).wait()
        ids = self._pipeline.from_last_stage(ids).wait()
        self.forget()
        if scores.isnan().any():
            raise not_numbers()
        found = [
            ScoredToken(token, own, list(zip(likeliest, top, strict=True)))
            for token, (own, *top), likeliest in zip(
                [token for target in targets for token in target],
                scores.tolist(),
                ids.tolist(),
                strict=True,
            )
        ]
        return [
            found[start : start + len(target)]
            for start, target in zip(starts, targets, strict=True)
        ]

    @torch.inference_mode()
    def all_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Computes what `Engine.all_logits` does."""
        longest = max(len(prompt) for prompt in prompts)
        whole: Tensor | None = None
        for row, start, logits in self._passes(prompts, [0] * len(prompts)):
            if whole is None:
                whole = logits.new_zeros(len(prompts), longest, logits.size(-1))
            first = longest - len(prompts[row]) + start
            whole[row, first : first + len(logits)] = logits
        self._pipeline.finish_sending()
        return whole

    def _passes(
        self,
        rows: Sequence[Sequence[int]],
        firsts: Sequence[int],
        chunk: int = _CHUNK,
        adapter: str | None = None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Reads rows of token ids, and yields logits on the last stage.

        Args:
            rows: The token ids of each row; at least one each.
            firsts: The first position of each row whose logits are wanted.
            chunk: The most tokens that one forward pass reads.
            adapter: The name of the adapter that is computed with.

        Yields:
            A row's index, a position, and the logits from that position on, [positions, vocab].
            Those of a long row may come in several parts.
        """
        texts = [list(row) for row in rows]  # which compare with each other
        plan = self._plan(texts, firsts)
        places = {one.row: one.place for one in plan}
        for _, level in groupby(plan, key=lambda one: one.level):
            unread = list(level)
            for one in unread:
                if one.source is not None:
                    self._cache.copy(self._cache, places[one.source], one.place, 0, one.start)
            yield from self._read(unread, texts, firsts, chunk, adapter)
        self._held |= {places[row]: tokens for row, tokens in enumerate(texts)}

    def _plan(self, rows: Sequence[list[int]], firsts: Sequence[int]) -> list[_Unread]:
        """Gives each row of tokens a row of the cache, and says from where on it must be read.

        Returns:
            What is to be read, those first that others need.
        """
        free = dict(self._held)
        found: list[_Unread] = []
        for branch in branches_of(rows, firsts):
            row = branch.row
            # What an earlier call has left in a row of the cache needs no copy.
            shared = {at: shared_length(rows[row], free[at], firsts[row]) for at in free}
            best = max(shared, key=lambda at: shared[at], default=-1)
            if shared.get(best, 0) >= max(branch.start, 1):
                del free[best]
                found.append(_Unread(row, best, shared[best], None, 0))
            else:
                found.append(_Unread(row, -1, branch.start, branch.source, branch.level))
        spare = iter([*free, *range(len(self._held), len(self._held) + len(rows))])
        found = [one if one.place >= 0 else replace(one, place=next(spare)) for one in found]
        count = max((one.place for one in found), default=-1) + 1
        self._cache.grow(bucket(count), bucket(max(map(len, rows), default=0), SMALLEST))
        self._held |= {at: [] for at in range(self._cache.num_rows) if at not in self._held}
        self._held |= {one.place: [] for one in found}  # until all of the call is read
        return sorted(found, key=lambda one: one.level)

    def _read(
        self,
        unread: Sequence[_Unread],
        rows: Sequence[list[int]],
        firsts: Sequence[int],
        chunk: int,
        adapter: str | None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Reads tokens, and yields logits as `_passes` does.

        Args:
            unread: What is to be read.
            rows: The token ids of each row.
            firsts: The first position of each row whose logits are wanted.
            chunk: The most tokens that one forward pass reads.
            adapter: The name of the adapter that is computed with.
        """
        for pieces in _chunks(unread, rows, chunk):
            wanted: list[int] = []
            parts, count = [], 0
            for row, run in pieces:
                first = max(firsts[row], run.start)
                if first < run.end:
                    parts.append((row, first, run.end - first))
                    wanted += range(count + first - run.start, count + run.end - run.start)
                count += len(run.tokens)
            logits = self._pipeline.forward(
                [replace(run, adapter=adapter) for _, run in pieces], self._cache, wanted
            )
            if logits is None:
                continue
            split = torch.split(self._pipeline.whole_vocabulary(logits), [n for *_, n in parts])
            for (row, first, _), piece in zip(parts, split, strict=True):
                yield row, first, piece


def _chunks(
    unread: Sequence[_Unread], rows: Sequence[list[int]], chunk: int
) -> Iterator[list[tuple[int, Run]]]:
    """Yields what one pass after the other reads: runs, each with the index of its row."""
    pieces: list[tuple[int, Run]] = []
    room = chunk
    for one in unread:
        start, tokens = one.start, rows[one.row]
        while start < len(tokens):
            part = tokens[start : start + room]
            pieces.append((one.row, Run(one.place, start, part)))
            start, room = start + len(part), room - len(part)
            if room == 0:
                yield pieces
                pieces, room = [], chunk
    if pieces:
        yield pieces
