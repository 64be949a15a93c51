"""`Engine`: continues and scores token ids, at any tensor and pipeline parallel size.

It knows nothing of text, and leaves forward passes to `infer.pipeline`. The ranks that share a copy
of the model must call the same methods with the same arguments, and get the same results.

A pass either reads prompts, as many of their tokens as fit into a chunk, or makes one token more of
every text of a lane. With several pipeline stages there are as many lanes, whose passes follow each
other through the stages: while the last stage works on one, the first works on the next. A text
that ends leaves its row at once to one that waits.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import DType, ModelConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.errors import ConfigError
from glm3cli.infer.decoding.choice import Chooser, Chosen, Place, read
from glm3cli.infer.pipeline import Arriving, Pipeline
from glm3cli.infer.requests import Generation, Request, Timing
from glm3cli.infer.rows import SMALLEST, Lane, Text, share_prefix
from glm3cli.infer.sampling import Sampling
from glm3cli.infer.scoring import Scoring
from glm3cli.model.cache import bucket
from glm3cli.model.decoder import Run
from glm3cli.parallel.groups import Grid

# Gets the new tokens of each prompt after a step; none where a prompt waits or has ended.
OnTokens = Callable[[list[list[int]]], None]
# The most tokens of prompts that one pass reads.
CHUNK = 1024
# The most texts that run side by side, unless a caller says otherwise.
MAX_BATCH_SIZE = 32


@dataclass(frozen=True)
class _Flight:
    """A pass whose tokens are under way from the last stage.

    Attributes:
        lane: The lane whose rows it works on.
        texts: The texts that get a token, in the order of `places`.
        places: The places at which tokens are chosen.
        chosen: What was chosen.
    """

    lane: Lane
    texts: list[Text]
    places: list[Place]
    chosen: Arriving


class Engine:
    """This rank's part of a model that continues and scores prompts.

    Requests are added, and each `step` makes the next tokens of some of those that run.

    Attributes:
        model: The shape of the model.
        grid: This rank's place among the parallel groups.
        results: The continuation of every request, as far as it has come, by the number that `add`
            has returned.
        chunk: The most tokens of prompts that one pass reads.
        scoring: Scores prompts and continuations.
    """

    def __init__(
        self,
        source: WeightSource,
        parallel: ParallelConfig,
        dtype: DType,
        grid: Grid,
        max_batch_size: int = MAX_BATCH_SIZE,
        adapter: Adapter | None = None,
    ) -> None:
        """Builds this rank's part of the model, and loads its weights.

        Args:
            source: The weights.
            parallel: The parallel sizes.
            dtype: The type in which the model runs.
            grid: This rank's place among the parallel groups.
            max_batch_size: The most texts that run side by side.
            adapter: A LoRA adapter of the model, which isn't merged; None for the bare model.

        Raises:
            CheckpointError: The source lacks a tensor or can't be read.
        """
        self.model: ModelConfig = source.model
        self.grid = grid
        self.results: dict[int, Generation] = {}
        self.chunk = CHUNK
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, Text] = {}
        self._flights: deque[_Flight] = deque()
        self._count = 0
        self._pipeline = Pipeline(source, parallel, dtype, grid, adapter)
        self._chooser = Chooser(self._pipeline, grid, require_active().torch_device())
        self.scoring = Scoring(self._pipeline, grid)
        rows = -(-max_batch_size // grid.pp_size)
        self._lanes = [Lane(self._pipeline.new_cache(), rows) for _ in range(grid.pp_size)]

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
        return not self._running and not self._waiting

    def end(self, number: int) -> None:
        """Ends a request, whether it runs or waits; it gets no further token.

        The ranks that share the model must end the same requests between the same steps.

        Args:
            number: The number that `add` has returned.
        """
        self._waiting.pop(number, None)
        if number in self._running:
            self._leave(self._running[number], "stop")

    @torch.inference_mode()
    def step(self) -> dict[int, list[int]]:
        """Makes the next tokens of requests that run, or of those that waited for room.

        With several pipeline stages the requests of one lane get theirs, and those of the other
        lanes in the steps after.

        Returns:
            The new tokens of requests, by their numbers. A stop token isn't among them, and a
            request that gets no token in this step is left out.

        Raises:
            CheckpointError: The logits are NaN.
        """
        while len(self._flights) < self.grid.pp_size and self._launch():
            pass
        return self._land() if self._flights else {}

    def _launch(self) -> bool:
        """Begins the next pass, if there is one to begin."""
        self._admit()
        for lane in self._lanes:
            if lane.is_busy or not lane.texts:
                continue
            reading = self._unread(lane)
            # Passes take turns, so that a long prompt doesn't hold up those that run.
            texts = [text for text in lane.texts.values() if not text.needs_prefill]
            if reading and not (texts and lane.has_read):
                self._run(lane, reading)
                lane.has_read = True
            elif texts:
                self._run(lane, [(text, len(text.tokens)) for text in texts])
                lane.has_read = False
            else:
                continue
            self._lanes.remove(lane)  # the others come first next time
            self._lanes.append(lane)
            return True
        return False

    def _admit(self) -> None:
        """Gives rows to requests that wait, as long as there is room."""
        while self._waiting:
            lane = max(self._lanes, key=lambda lane: lane.room)
            if not lane.room:
                return
            number = next(iter(self._waiting))
            request = self._waiting.pop(number)
            self._running[number] = lane.begin(number, request)

    def _unread(self, lane: Lane) -> list[tuple[Text, int]]:
        """Returns the prompts that the next pass reads on, and up to which of their tokens."""
        room, found = self.chunk, []
        for text in sorted(lane.texts.values(), key=lambda text: text.number):
            if room and text.needs_prefill and not share_prefix(text, self._lanes):
                end = min(text.cached + room, len(text.tokens))
                room -= end - text.cached
                found.append((text, end))
        return found

    def _run(self, lane: Lane, parts: Sequence[tuple[Text, int]]) -> None:
        """Begins a pass that reads each of some texts up to a token."""
        runs = [Run(text.row, text.cached, text.tokens[text.cached : end]) for text, end in parts]
        texts, wanted, count = [], [], 0
        for run, (text, end) in zip(runs, parts, strict=True):
            count += len(run.tokens)
            if end == len(text.tokens):
                texts.append(text)
                wanted.append(count - 1)
        lane.cache.grow(0, bucket(max(run.end for run in runs), SMALLEST))
        logits = self._pipeline.forward(runs, lane.cache, wanted)
        for text, end in parts:
            text.cached = end
        if not texts:
            return
        places = [_place(text) for text in texts]
        chosen = self._pipeline.from_last_stage(self._chooser.choose(logits, places))
        self._flights.append(_Flight(lane, texts, places, chosen))
        lane.is_busy = True

    def _land(self) -> dict[int, list[int]]:
        """Waits for the tokens of the pass that was begun first, and returns them."""
        flight = self._flights.popleft()
        flight.lane.is_busy = False
        new: dict[int, list[int]] = {}
        found = read(flight.chosen.wait(), flight.places)
        for text, chosen in zip(flight.texts, found, strict=True):
            if text.has_ended:
                flight.lane.end(text)
            elif chosen.token in text.request.stop_ids:
                self._leave(text, "stop")
            else:
                new[text.number] = [chosen.token]
                self._extend(text, chosen)
        return new

    def _extend(self, text: Text, chosen: Chosen) -> None:
        """Adds a token to a text, and ends the text if it was the last one."""
        request, result = text.request, self.results[text.number]
        text.tokens.append(chosen.token)
        result.token_ids.append(chosen.token)
        if chosen.logprob is not None:
            result.logprobs.append(chosen.logprob)
        if request.logprobs:
            result.top_logprobs.append(chosen.top)
        if request.is_end is not None and request.is_end(result.token_ids):
            self._leave(text, "stop_text")
        elif len(result.token_ids) == request.max_new_tokens:
            self._leave(text, "length")

    def _leave(self, text: Text, reason: str) -> None:
        """Ends a text; its row is free when no pass works on it any more."""
        self.results[text.number].finish_reason = reason
        del self._running[text.number]
        if any(text in flight.texts for flight in self._flights):
            text.has_ended = True
        else:
            text.lane.end(text)

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
        """Continues prompts side by side, until all have ended.

        Args:
            prompts: The token ids of each prompt; at least one each.
            sampling: The rule by which tokens are drawn.
            max_new_tokens: The length of the longest continuation, in tokens.
            stop_ids: The ids of the tokens that end a continuation.
            seed: The seed of the random numbers; prompt i gets a generator seeded with seed + i.
            on_tokens: Called after each step with the new tokens of each prompt.
            timing: Is filled with the time that it took.

        Returns:
            The continuation of each prompt, in the order of the prompts.

        Raises:
            ConfigError: A prompt is empty, or `max_new_tokens` is less than 1.
            CheckpointError: The logits are NaN.
        """
        requests = [
            Request(prompt, sampling, max_new_tokens, stop_ids, seed + index)
            for index, prompt in enumerate(prompts)
        ]
        return self.answer(requests, on_tokens, timing)

    def answer(
        self,
        requests: Sequence[Request],
        on_tokens: OnTokens | None = None,
        timing: Timing | None = None,
    ) -> list[Generation]:
        """Runs requests until all have ended, and returns their continuations in their order.

        Args:
            requests: The requests.
            on_tokens: Called after each step with the new tokens of each request.
            timing: Is filled with the time that it took.

        Raises:
            ConfigError: A request is one that `add` refuses.
            CheckpointError: The logits are NaN.
        """
        started = time.perf_counter()
        numbers: list[int] = []
        try:
            numbers.extend(self.add(request) for request in requests)
            silent = set(numbers)  # those that have no token yet
            while not self.is_idle:
                new = self.step()
                if timing is not None and silent:
                    silent = {n for n in silent - new.keys() if self._is_open(n)}
                    timing.first_token = time.perf_counter() - started
                if on_tokens is not None:
                    on_tokens([new.get(number, []) for number in numbers])
        finally:  # after Ctrl-C, too: in a notebook the next prompts are continued by this engine
            for number in numbers:
                self.end(number)
            results = [self.results.pop(number) for number in numbers]
        if timing is not None:
            timing.total = time.perf_counter() - started
            timing.num_tokens = sum(len(result.token_ids) for result in results)
        return results

    def _is_open(self, number: int) -> bool:
        """Returns whether a request runs or waits."""
        return number in self._running or number in self._waiting

    def next_logprobs(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        """Computes the log-probabilities of candidates for the token after each prompt.

        Args:
            prompts: The token ids of each prompt; at least one each.
            candidates: The token ids to score.

        Returns:
            The log-probabilities (natural logarithms) of the candidates for each prompt.
        """
        return self.scoring.next_logprobs(prompts, candidates)

    def continuation_logprobs(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Computes the log-probability of each continuation after its context.

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
        return self.scoring.continuation_logprobs(contexts, continuations)

    def all_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Returns the logits at every position of the prompts; None before the last stage.

        Args:
            prompts: The token ids of b prompts.

        Returns:
            The logits, [b, s, vocab], where s is the length of the longest prompt. Shorter prompts
            have zeros in front.
        """
        return self.scoring.all_logits(prompts)


def _place(text: Text) -> Place:
    """Returns the place at which the next token of a text is chosen."""
    request = text.request
    return Place(request.sampling, text.generator, request.prompt, text.new, request.logprobs)
