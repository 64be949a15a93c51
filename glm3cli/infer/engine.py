"""Token ids in, token ids or log-probabilities out, at any tp and pp; knows nothing of text.

Every rank of a model copy calls the same methods with the same arguments and gets the same results.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from glm3cli.checkpoint.load import load_weights
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import DType, ModelConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.infer.sampling import Sampling, sample
from glm3cli.model.build import build_chunks, transformer_config, unwrap
from glm3cli.model.cache import CacheWindow, KVCache
from glm3cli.parallel.groups import Grid

OnTokens = Callable[[list[int | None]], None]


@dataclass
class Generation:
    """The continuation of one prompt.

    Attributes:
        token_ids: New tokens; the stop token is not among them.
        logprobs: Log-probability of each of them before temperature and filters.
        finish_reason: `stop` at a stop token, `length` at the limit.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Timing:
    """How long a generation took; seconds."""

    first_token: float = 0.0
    total: float = 0.0
    num_tokens: int = 0


class Engine:
    """One rank's part of a model that generates and scores."""

    def __init__(
        self, source: WeightSource, parallel: ParallelConfig, dtype: DType, grid: Grid
    ) -> None:
        self.model: ModelConfig = source.model
        self.grid = grid
        # A decoded token is one position: it can't be split over tensor parallel ranks.
        config = transformer_config(source.model, parallel, dtype, sequence_parallel=False)
        self._chunk = build_chunks(source.model, parallel, config)[0].eval()
        self._gpt = unwrap(self._chunk)
        load_weights([self._gpt], source, parallel, grid)
        self._keep = 1
        if grid.is_last_stage:
            self._gpt.output_layer.register_forward_pre_hook(self._last_positions)
        self._device = require_active().torch_device()

    def _last_positions(self, _layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Logits of a whole prompt are gigabytes; rows end at the last slot, so these suffice.
        return (args[0][-self._keep :], *args[1:])

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int = 0,
        on_tokens: OnTokens | None = None,
        timing: Timing | None = None,
    ) -> list[Generation]:
        """Continues all prompts together; each row ends at its own stop token.

        Args:
            prompts: At least one token each.
            sampling: How tokens are drawn.
            max_new_tokens: Longest continuation.
            stop_ids: Tokens that end a row.
            seed: Row i draws from a generator seeded with seed + i.
            on_tokens: Called after each step with the new token of every row (None: row is done).
            timing: Filled with the time taken.
        """
        started = time.perf_counter()
        results = [Generation() for _ in prompts]
        open_rows = set(range(len(prompts)))
        generators = [torch.Generator().manual_seed(seed + row) for row in open_rows]
        tokens, padding = self._left_padded(prompts)
        with self._cached(tokens.size(1) + max_new_tokens, padding) as window:
            for step in range(max_new_tokens):
                logits = self._forward(tokens)
                chosen, logprobs = self._choose(logits, len(prompts), sampling, generators)
                if timing is not None and step == 0:
                    timing.first_token = time.perf_counter() - started
                new = self._record(chosen, logprobs, results, open_rows, stop_ids)
                if on_tokens is not None:
                    on_tokens(new)
                if not open_rows:
                    break
                window.start += tokens.size(1)
                tokens = torch.tensor(chosen, device=self._device).unsqueeze(1)
        if timing is not None:
            timing.total = time.perf_counter() - started
            timing.num_tokens = sum(len(result.token_ids) for result in results)
        return results

    @torch.no_grad()
    def next_logprobs(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        """Log-probabilities of `candidates` as the token after each prompt; one forward pass."""
        tokens, padding = self._left_padded(prompts)
        with self._cached(tokens.size(1), padding):
            logits = self._forward(tokens)
        shape = (len(prompts), len(candidates))
        scores = torch.zeros(shape, device=self._device)
        if logits is not None:
            scores = logits[:, -1].float().log_softmax(dim=-1)[:, list(candidates)]
        return self._from_last_stage(scores).tolist()

    @torch.no_grad()
    def continuation_logprobs(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """For each row, the log-probability of its continuation, and whether greedy gives it."""
        longest = max(len(continuation) for continuation in continuations)
        rows = [[*a, *b][:-1] for a, b in zip(contexts, continuations, strict=True)]
        tokens, padding = self._left_padded(rows)
        with self._cached(tokens.size(1), padding), self._keeping(longest):
            logits = self._forward(tokens)
        scores = torch.zeros((len(rows), 2), device=self._device)
        if logits is not None:
            for row, continuation in enumerate(continuations):
                target = torch.tensor(continuation, device=logits.device)
                logprobs = logits[row, -len(continuation) :].float().log_softmax(dim=-1)
                scores[row, 0] = logprobs.gather(1, target.unsqueeze(1)).sum()
                scores[row, 1] = (logprobs.argmax(dim=-1) == target).all()
        return [(total, bool(greedy)) for total, greedy in self._from_last_stage(scores).tolist()]

    @torch.no_grad()
    def all_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Logits at every position, [b, longest, vocab] left-padded; None before the last stage."""
        tokens, padding = self._left_padded(prompts)
        with self._cached(tokens.size(1), padding), self._keeping(tokens.size(1)):
            return self._forward(tokens)

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, tuple[int, ...]]:
        """[b, longest] tokens, and the number of pads in front of each row."""
        longest = max(len(prompt) for prompt in prompts)
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        padding = tuple(longest - len(prompt) for prompt in prompts)
        return torch.tensor(rows, device=self._device), padding

    @contextmanager
    def _cached(self, capacity: int, padding: tuple[int, ...]) -> Iterator[CacheWindow]:
        """Gives every layer a KV cache for `capacity` slots, and takes it away again."""
        window = CacheWindow(padding=padding)
        attentions = [layer.self_attention.core_attention for layer in self._gpt.decoder.layers]
        for attention in attentions:
            attention.cache = KVCache(window, capacity)
        try:
            yield window
        finally:
            for attention in attentions:
                attention.cache = None

    @contextmanager
    def _keeping(self, num_positions: int) -> Iterator[None]:
        """Computes the logits of so many last positions instead of one."""
        self._keep = num_positions
        try:
            yield
        finally:
            self._keep = 1

    def _forward(self, tokens: Tensor) -> Tensor | None:
        """One pass of the pipeline; [b, kept positions, vocab] on the last stage, else None."""
        collected = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([tokens]),
            model=self._chunk,
            num_microbatches=1,
            seq_length=tokens.size(1),
            micro_batch_size=tokens.size(0),
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not self.grid.is_last_stage:
            return None
        return gather_from_tensor_model_parallel_region(collected[0])

    def _choose(
        self,
        logits: Tensor | None,
        num_rows: int,
        sampling: Sampling,
        generators: list[torch.Generator],
    ) -> tuple[list[int], list[float]]:
        """The next token of every row and its log-probability, on every rank."""
        # fp64 holds a token id and an fp32 log-probability exactly.
        chosen = torch.zeros((2, num_rows), dtype=torch.float64, device=self._device)
        if logits is not None:
            last = logits[:, -1].float()
            tokens = sample(last, sampling, generators)
            chosen[0] = tokens
            chosen[1] = last.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        chosen = self._from_last_stage(chosen)
        return [int(token) for token in chosen[0].tolist()], chosen[1].tolist()

    def _from_last_stage(self, tensor: Tensor) -> Tensor:
        if self.grid.pp_size > 1:
            dist.broadcast(tensor, self.grid.last_stage_rank, group=self.grid.pp_group)
        return tensor

    @staticmethod
    def _record(
        chosen: list[int],
        logprobs: list[float],
        results: list[Generation],
        open_rows: set[int],
        stop_ids: Sequence[int],
    ) -> list[int | None]:
        new: list[int | None] = [None] * len(results)
        for row in sorted(open_rows):
            if chosen[row] in stop_ids:
                results[row].finish_reason = "stop"
                open_rows.discard(row)
            else:
                new[row] = chosen[row]
                results[row].token_ids.append(chosen[row])
                results[row].logprobs.append(logprobs[row])
        return new


def _forward_step(
    tokens: Iterator[Tensor], model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Tensor]]:
    return model(next(tokens), None, None), lambda output, non_loss_data: output
