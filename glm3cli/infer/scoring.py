"""`Scoring`: log-probabilities of given tokens, by forward passes without a choice."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from glm3cli.device import require_active
from glm3cli.infer.pipeline import Pipeline, not_numbers
from glm3cli.model.decoder import Run
from glm3cli.parallel.groups import Grid

# The most tokens that one forward pass reads: of rows that are longer, as many as fit.
_CHUNK = 4096


class Scoring:
    """Scores token ids with the ranks that share the model, which must call the same methods."""

    def __init__(self, pipeline: Pipeline, grid: Grid) -> None:
        self._pipeline, self._grid = pipeline, grid
        self._device = require_active().torch_device()

    @torch.inference_mode()
    def next_logprobs(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        """Computes what `Engine.next_logprobs` does."""
        scores = torch.zeros((len(prompts), len(candidates)), device=self._device)
        wanted = torch.tensor(list(candidates), device=self._device)
        for row, _, logits in self._passes(prompts, [len(prompt) - 1 for prompt in prompts]):
            scores[row] = logits[-1].log_softmax(dim=-1)[wanted]
        return self._pipeline.from_last_stage(scores).wait().tolist()

    @torch.inference_mode()
    def continuation_logprobs(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Computes what `Engine.continuation_logprobs` does.

        Raises:
            CheckpointError: The logits are NaN.
        """
        texts = [[*a, *b] for a, b in zip(contexts, continuations, strict=True)]
        asked = [index for index, one in enumerate(continuations) if one]
        scores = torch.zeros((len(texts), 2), device=self._device)
        rows = [texts[index][:-1] for index in asked]
        firsts = [len(contexts[index]) - 1 for index in asked]
        for row, start, logits in self._passes(rows, firsts):
            target = texts[asked[row]][start + 1 : start + 1 + len(logits)]
            targets = torch.tensor(target, device=self._device)
            logprobs = logits.log_softmax(dim=-1)
            scores[asked[row], 0] += logprobs.gather(1, targets.unsqueeze(1)).sum()
            scores[asked[row], 1] += (logprobs.argmax(dim=-1) != targets).sum()
        scores = self._pipeline.from_last_stage(scores).wait()
        if scores.isnan().any():
            raise not_numbers()
        return [(total, misses == 0) for total, misses in scores.tolist()]

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
        return whole

    def _passes(
        self, rows: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Reads rows of token ids, and yields logits on the last stage.

        Args:
            rows: The token ids of each row; at least one each.
            firsts: The first position of each row whose logits are wanted.

        Yields:
            A row's index, a position, and the logits from that position on, [positions, vocab].
            Those of a long row may come in several parts.
        """
        cache = self._pipeline.new_cache()
        cache.grow(len(rows), max((len(row) for row in rows), default=0))
        for runs in _chunks(rows):
            wanted: list[int] = []
            parts, count = [], 0
            for run in runs:
                first = max(firsts[run.row], run.start)
                if first < run.end:
                    parts.append((run.row, first, run.end - first))
                    wanted += range(count + first - run.start, count + run.end - run.start)
                count += len(run.tokens)
            logits = self._pipeline.forward(runs, cache, wanted)
            if logits is None:
                continue
            pieces = torch.split(self._pipeline.whole_vocabulary(logits), [n for *_, n in parts])
            for (row, first, _), piece in zip(parts, pieces, strict=True):
                yield row, first, piece


def _chunks(rows: Sequence[Sequence[int]]) -> Iterator[list[Run]]:
    """Yields the runs of one pass after the other that read rows from their first tokens on."""
    runs: list[Run] = []
    room = _CHUNK
    for row, tokens in enumerate(rows):
        start = 0
        while start < len(tokens):
            part = tokens[start : start + room]
            runs.append(Run(row, start, part))
            start, room = start + len(part), room - len(part)
            if room == 0:
                yield runs
                runs, room = [], _CHUNK
    if runs:
        yield runs
