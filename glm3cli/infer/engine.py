"""`Engine`: continues and scores token ids, at any tensor and pipeline parallel size.

It knows nothing of text, and leaves forward passes to `infer.pipeline`. The ranks that share a copy
of the model must call the same methods with the same arguments, and get the same results.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import DType, ModelConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.infer.pipeline import Pipeline
from glm3cli.infer.requests import Generation, Request, Timing
from glm3cli.infer.sampling import Sampling, sample
from glm3cli.model.cache import CacheWindow
from glm3cli.parallel.groups import Grid

_log = logging.getLogger(__name__)
# Gets the new token of each prompt after a step; None where a prompt has ended.
OnTokens = Callable[[list[int | None]], None]


@dataclass
class _Batch:
    """The requests that run side by side, one row each.

    Attributes:
        numbers: The number of each row's request.
        requests: The request of each row.
        generators: The random generator of each row.
        running: The rows whose requests haven't ended.
        window: The slots of the KV cache that the next forward pass works on.
        tokens: The tokens that the next forward pass reads, [rows, slots].
        caches: Removes the layers' KV caches when the batch is done.
    """

    numbers: list[int]
    requests: list[Request]
    generators: list[torch.Generator]
    running: set[int]
    window: CacheWindow
    tokens: Tensor
    caches: ExitStack


class Engine:
    """This rank's part of a model that continues and scores prompts.

    Requests are added, and each `step` makes one token for every request that runs. Requests that
    wait begin together, when those before them have all ended.

    Attributes:
        model: The shape of the model.
        grid: This rank's place among the parallel groups.
        results: The continuation of every request, as far as it has come, by the number that `add`
            has returned.
    """

    def __init__(
        self, source: WeightSource, parallel: ParallelConfig, dtype: DType, grid: Grid
    ) -> None:
        """Builds this rank's part of the model, and loads its weights.

        Args:
            source: The weights.
            parallel: The parallel sizes.
            dtype: The type in which the model runs.
            grid: This rank's place among the parallel groups.

        Raises:
            CheckpointError: The source lacks a tensor or can't be read.
        """
        self.model: ModelConfig = source.model
        self.grid = grid
        self.results: dict[int, Generation] = {}
        self._waiting: dict[int, Request] = {}
        self._batch: _Batch | None = None
        self._count = 0
        self._pipeline = Pipeline(source, parallel, dtype, grid)
        self._device = require_active().torch_device()
        self._is_warned = False

    def add(self, request: Request) -> int:
        """Adds a request, and returns the number under which `results` has its continuation.

        Raises:
            ConfigError: The prompt is empty, or the continuation may have no token.
        """
        if not request.prompt:
            raise ConfigError("a prompt has no token, and needs at least one", "give it a text")
        if request.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {request.max_new_tokens}, and must be at least 1",
                "give the length of the longest continuation, in tokens",
            )
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

        The ranks that share the model must end the same requests between the same steps.

        Args:
            number: The number that `add` has returned.
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
        """Makes the next token of every request that runs.

        If none runs, those that wait begin.

        Returns:
            The new token of each request, by the request's number. Requests that have ended with a
            stop token in this step are left out.

        Raises:
            CheckpointError: The logits are NaN.
        """
        batch = self._batch or self._begin()
        if batch is None:
            return {}
        self._watch_positions(batch.window.start + batch.tokens.size(1))
        logits = self._pipeline.forward(batch.tokens)
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
        """Starts all requests that wait, as one batch, which is returned; None if none waits."""
        if not self._waiting:
            return None
        numbers, requests = list(self._waiting), list(self._waiting.values())
        self._waiting = {}
        tokens, padding = self._pipeline.left_padded([request.prompt for request in requests])
        capacity = tokens.size(1) + max(request.max_new_tokens for request in requests)
        caches = ExitStack()
        self._batch = _Batch(
            numbers=numbers,
            requests=requests,
            generators=[torch.Generator().manual_seed(request.seed) for request in requests],
            running=set(range(len(requests))),
            window=caches.enter_context(self._pipeline.cached(capacity, padding)),
            tokens=tokens,
            caches=caches,
        )
        return self._batch

    def _leave(self, batch: _Batch, row: int) -> None:
        """Marks the request of a row as ended, and frees the KV caches after the last one."""
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
        """Continues prompts together, until all have ended.

        Args:
            prompts: The token ids of each prompt; at least one each.
            sampling: The rule by which tokens are drawn.
            max_new_tokens: The length of the longest continuation, in tokens.
            stop_ids: The ids of the tokens that end a continuation.
            seed: The seed of the random numbers; prompt i gets a generator seeded with seed + i.
            on_tokens: Called after each step with the new token of each prompt; None where a prompt
                has ended.
            timing: Is filled with the time that it took.

        Returns:
            The continuation of each prompt, in the order of the prompts.

        Raises:
            ConfigError: A prompt is empty, or `max_new_tokens` is less than 1.
            CheckpointError: The logits are NaN.
        """
        started = time.perf_counter()
        numbers: list[int] = []
        try:
            for index, prompt in enumerate(prompts):
                request = Request(prompt, sampling, max_new_tokens, stop_ids, seed + index)
                numbers.append(self.add(request))
            is_first = True
            while not self.is_idle:
                new = self.step()
                if timing is not None and is_first:
                    timing.first_token = time.perf_counter() - started
                is_first = False
                if on_tokens is not None:
                    on_tokens([new.get(number) for number in numbers])
        finally:  # after Ctrl-C, too: in a notebook the next prompts are continued by this engine
            for number in numbers:
                self.end(number)
            results = [self.results.pop(number) for number in numbers]
        if timing is not None:
            timing.total = time.perf_counter() - started
            timing.num_tokens = sum(len(result.token_ids) for result in results)
        return results

    @torch.no_grad()
    def next_logprobs(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        """Computes the log-probabilities of candidates for the token after each prompt.

        Takes one forward pass.

        Args:
            prompts: The token ids of each prompt; at least one each.
            candidates: The token ids to score.

        Returns:
            The log-probabilities (natural logarithms) of the candidates for each prompt.
        """
        tokens, padding = self._pipeline.left_padded(prompts)
        self._watch_positions(tokens.size(1))
        with self._pipeline.cached(tokens.size(1), padding):
            logits = self._pipeline.forward(tokens)
        shape = (len(prompts), len(candidates))
        scores = torch.zeros(shape, device=self._device)
        if logits is not None:
            scores = logits[:, -1].float().log_softmax(dim=-1)[:, list(candidates)]
        return self._pipeline.from_last_stage(scores).tolist()

    @torch.no_grad()
    def continuation_logprobs(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Computes the log-probability of each continuation after its context.

        Takes one forward pass.

        Args:
            contexts: The token ids that come before; at least one each.
            continuations: The token ids to score, one sequence for each context; an empty one is
                certain, and has the log-probability 0.

        Returns:
            The log-probability (natural logarithm) of each continuation, and whether each of its
            tokens is the likeliest one.

        Raises:
            CheckpointError: The logits are NaN.
        """
        longest = max((len(continuation) for continuation in continuations), default=0)
        if longest == 0:
            return [(0.0, True)] * len(continuations)
        rows = [[*a, *b][:-1] for a, b in zip(contexts, continuations, strict=True)]
        tokens, padding = self._pipeline.left_padded(rows)
        self._watch_positions(tokens.size(1))
        with self._pipeline.cached(tokens.size(1), padding), self._pipeline.keeping(longest):
            logits = self._pipeline.forward(tokens)
        scores = torch.zeros((len(rows), 2), device=self._device)
        if logits is not None:
            for row, continuation in enumerate(continuations):
                target = torch.tensor(continuation, dtype=torch.long, device=logits.device)
                first = logits.size(1) - len(continuation)
                logprobs = logits[row, first:].float().log_softmax(dim=-1)
                scores[row, 0] = logprobs.gather(1, target.unsqueeze(1)).sum()
                scores[row, 1] = (logprobs.argmax(dim=-1) == target).all()
        scores = _numbers(self._pipeline.from_last_stage(scores))
        return [(total, bool(is_greedy)) for total, is_greedy in scores.tolist()]

    @torch.no_grad()
    def all_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Returns the logits at every position of the prompts; None before the last stage.

        Args:
            prompts: The token ids of b prompts.

        Returns:
            The logits, [b, s, vocab], where s is the length of the longest prompt. Shorter prompts
            are padded on the left, and have arbitrary logits there.
        """
        tokens, padding = self._pipeline.left_padded(prompts)
        with self._pipeline.cached(tokens.size(1), padding), self._pipeline.keeping(tokens.size(1)):
            return self._pipeline.forward(tokens)

    def _watch_positions(self, length: int) -> None:
        """Warns once where sequences get longer than those that the model was trained on.

        Args:
            length: The length of the longest sequence that a forward pass reads, in tokens.
        """
        if length > self.model.seq_length and not self._is_warned:
            self._is_warned = True
            if self.grid.rank == 0:
                _log.warning(
                    "warning: a sequence gets longer than the %d positions that the model was "
                    "trained on (seq_length of its config.json); expect nonsense behind them",
                    self.model.seq_length,
                )

    def _choose(self, logits: Tensor | None, batch: _Batch) -> tuple[list[int], list[float]]:
        """Draws the next token of every row.

        Args:
            logits: The logits, [rows, positions, vocab], on the last stage.
            batch: The requests that run.

        Returns:
            The token of each row, and its log-probability; the same on every rank.

        Raises:
            CheckpointError: The logits are NaN.
        """
        # fp64 holds a token id and an fp32 log-probability exactly.
        shape = (2, len(batch.requests))
        chosen = torch.zeros(shape, dtype=torch.float64, device=self._device)
        if logits is not None:
            last = logits[:, -1].float()
            logprobs = last.log_softmax(dim=-1)
            if logprobs.isnan().any():  # told to all stages, which then raise together
                chosen[1] = torch.nan
            else:
                rules = [request.sampling for request in batch.requests]
                tokens = sample(last, rules, batch.generators)
                chosen[0] = tokens
                chosen[1] = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        chosen = _numbers(self._pipeline.from_last_stage(chosen))
        return [int(token) for token in chosen[0].tolist()], chosen[1].tolist()


def _numbers(values: Tensor) -> Tensor:
    """Returns the values, which come of logits, if they are numbers.

    Raises:
        CheckpointError: One of them is NaN.
    """
    if values.isnan().any():
        raise CheckpointError(
            "the model's logits are NaN",
            "use --dtype bf16 or fp32 if this is fp16; otherwise the weights are damaged",
        )
    return values
