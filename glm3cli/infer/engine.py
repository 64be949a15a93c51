"""Token ids in, token ids or log-probabilities out, at any tp and pp; knows nothing of text.

Every rank of a model copy calls the same methods with the same arguments and gets the same results.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: The token ids of the prompt; at least one.
        sampling: The rule by which tokens are drawn.
        max_new_tokens: The number of tokens after which the continuation ends.
        stop_ids: The token ids that end the continuation; they are not part of it.
        seed: The seed of the request's own random generator.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    seed: int = 0


@dataclass
class Generation:
    """The continuation of one prompt.

    Attributes:
        token_ids: The new tokens; a stop token is not among them.
        logprobs: The log-probability of each of them, before temperature and filters.
        finish_reason: `stop` after a stop token or `Engine.end`, `length` at the limit.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Timing:
    """The time that a generation took.

    Attributes:
        first_token: Seconds until the first token of all prompts.
        total: Seconds until the last token.
        num_tokens: The number of new tokens of all prompts together.
    """

    first_token: float = 0.0
    total: float = 0.0
    num_tokens: int = 0


@dataclass
class _Batch:
    """The requests that run side by side, one row each.

    Attributes:
        numbers: The request of each row.
        requests: The same as they were added.
        generators: Each row's own random generator.
        running: The rows that haven't ended.
        window: The place in the KV cache.
        tokens: What the next pass reads, [rows, slots].
        caches: Takes the layers' KV caches away when the batch is done.
    """

    numbers: list[int]
    requests: list[Request]
    generators: list[torch.Generator]
    running: set[int]
    window: CacheWindow
    tokens: Tensor
    caches: ExitStack


class Engine:
    """One rank's part of a model that generates and scores.

    Requests are added, and each `step` makes one token for all that run. Those that wait begin
    together when the ones before have all ended.

    Attributes:
        model: The model's shape.
        grid: This rank's coordinates.
        results: The continuation of every request so far, by the number that `add` gave.
    """

    def __init__(
        self, source: WeightSource, parallel: ParallelConfig, dtype: DType, grid: Grid
    ) -> None:
        """Builds this rank's part of the model and loads its weights from `source`."""
        self.model: ModelConfig = source.model
        self.grid = grid
        self.results: dict[int, Generation] = {}
        self._waiting: dict[int, Request] = {}
        self._batch: _Batch | None = None
        self._count = 0
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

    def add(self, request: Request) -> int:
        """Takes in a request, and returns the number under which its result will be found."""
        number = self._count
        self._count += 1
        self.results[number] = Generation()
        self._waiting[number] = request
        return number

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return self._batch is None and not self._waiting

    def end(self, number: int) -> None:
        """Ends a request, whether it runs or waits; it gets no further token.

        Every rank must end the same requests between the same steps.
        """
        self._waiting.pop(number, None)
        batch = self._batch
        if batch is not None and number in batch.numbers:
            row = batch.numbers.index(number)
            if row in batch.running:
                self.results[number].finish_reason = "stop"
                self._leave(batch, row)

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """Makes the next token of every running request.

        Returns:
            The new tokens by the requests' numbers; none of a request that has ended with a stop
            token in this step.
        """
        batch = self._batch or self._begin()
        if batch is None:
            return {}
        logits = self._forward(batch.tokens)
        chosen, logprobs = self._choose(logits, batch)
        new: dict[int, int] = {}
        for row in sorted(batch.running):
            number, request = batch.numbers[row], batch.requests[row]
            result = self.results[number]
            if chosen[row] in request.stop_ids:
                result.finish_reason = "stop"
                self._leave(batch, row)
                continue
            new[number] = chosen[row]
            result.token_ids.append(chosen[row])
            result.logprobs.append(logprobs[row])
            if len(result.token_ids) == request.max_new_tokens:
                self._leave(batch, row)
        batch.window.start += batch.tokens.size(1)
        batch.tokens = torch.tensor(chosen, device=self._device).unsqueeze(1)
        return new

    def _begin(self) -> _Batch | None:
        """Starts all waiting requests together; their prompts are padded on the left."""
        if not self._waiting:
            return None
        numbers, requests = list(self._waiting), list(self._waiting.values())
        self._waiting = {}
        tokens, padding = self._left_padded([request.prompt for request in requests])
        capacity = tokens.size(1) + max(request.max_new_tokens for request in requests)
        caches = ExitStack()
        self._batch = _Batch(
            numbers=numbers,
            requests=requests,
            generators=[torch.Generator().manual_seed(request.seed) for request in requests],
            running=set(range(len(requests))),
            window=caches.enter_context(self._cached(capacity, padding)),
            tokens=tokens,
            caches=caches,
        )
        return self._batch

    def _leave(self, batch: _Batch, row: int) -> None:
        batch.running.discard(row)
        if not batch.running:
            batch.caches.close()
            self._batch = None

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
        """Continues all prompts together; each ends at its own stop token.

        Args:
            prompts: The token ids of each prompt; at least one.
            sampling: The rule by which tokens are drawn.
            max_new_tokens: The length of the longest continuation, in tokens.
            stop_ids: The token ids that end a continuation.
            seed: Prompt i draws from a generator seeded with seed + i.
            on_tokens: Called after each step with the new token of every prompt; None where a
                prompt has ended.
            timing: Is filled with the time taken.
        """
        started = time.perf_counter()
        numbers = [
            self.add(Request(prompt, sampling, max_new_tokens, stop_ids, seed + index))
            for index, prompt in enumerate(prompts)
        ]
        is_first = True
        while not self.is_idle:
            new = self.step()
            if timing is not None and is_first:
                timing.first_token = time.perf_counter() - started
            is_first = False
            if on_tokens is not None:
                on_tokens([new.get(number) for number in numbers])
        results = [self.results.pop(number) for number in numbers]
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
        assert self._batch is None, "requests are running, whose cache this would replace"
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

    def _choose(self, logits: Tensor | None, batch: _Batch) -> tuple[list[int], list[float]]:
        """Draws the next token of every row, and its log-probability; the same on every rank."""
        # fp64 holds a token id and an fp32 log-probability exactly.
        shape = (2, len(batch.requests))
        chosen = torch.zeros(shape, dtype=torch.float64, device=self._device)
        if logits is not None:
            last = logits[:, -1].float()
            rules = [request.sampling for request in batch.requests]
            tokens = sample(last, rules, batch.generators)
            chosen[0] = tokens
            chosen[1] = last.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        chosen = self._from_last_stage(chosen)
        return [int(token) for token in chosen[0].tolist()], chosen[1].tolist()

    def _from_last_stage(self, tensor: Tensor) -> Tensor:
        if self.grid.pp_size > 1:
            dist.broadcast(tensor, self.grid.last_stage_rank, group=self.grid.pp_group)
        return tensor


def _forward_step(
    tokens: Iterator[Tensor], model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Tensor]]:
    return model(next(tokens), None, None), lambda output, non_loss_data: output
