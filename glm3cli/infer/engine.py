"""`Engine`: continues and scores token ids, at any tensor and pipeline parallel size.

It knows nothing of text, and leaves what runs when to `infer.batching`. The ranks that share a copy
of the model must call the same methods with the same arguments, and get the same results.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import DType, ModelConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.errors import ConfigError
from glm3cli.infer.batching import Batching
from glm3cli.infer.decoding.choice import Chooser
from glm3cli.infer.pipeline import Pipeline
from glm3cli.infer.requests import Generation, Request, Timing
from glm3cli.infer.sampling import Sampling
from glm3cli.infer.scoring import NextToken, ScoredToken, Scoring
from glm3cli.parallel.groups import Grid

# Gets the new tokens of each prompt after a step; none where a prompt waits or has ended.
OnTokens = Callable[[list[list[int]]], None]
# The most texts that a pass continues, unless a caller says otherwise.
MAX_BATCH_SIZE = 32


class Engine:
    """This rank's part of a model that continues and scores prompts.

    Requests are added, and each `step` makes the next tokens of some of those that run.

    Attributes:
        model: The shape of the model.
        grid: This rank's place among the parallel groups.
        batching: The requests that run and wait.
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
        bits: int | None = None,
        choices: Mapping[str, Adapter] | None = None,
    ) -> None:
        """Builds this rank's part of the model, and loads its weights.

        Args:
            source: The weights.
            parallel: The parallel sizes.
            dtype: The type in which the model runs.
            grid: This rank's place among the parallel groups.
            max_batch_size: The most texts that a pass continues. With pipeline stages as many
                passes are under way, each with texts of its own.
            adapter: A LoRA adapter of the model, which isn't merged; None for the bare model.
            bits: The bits to which weights are rounded, 8 or 4; None leaves them as they are.
            choices: Adapters by their names, among which each request chooses; they go without
                `adapter`.

        Raises:
            CheckpointError: The source lacks a tensor or can't be read.
        """
        self.model: ModelConfig = source.model
        self.grid = grid
        self._count = 0
        pipeline = Pipeline(source, parallel, dtype, grid, adapter, bits, choices)
        chooser = Chooser(pipeline, grid, require_active().torch_device())
        self.batching = Batching(pipeline, chooser, grid.pp_size, max_batch_size)
        self.scoring = Scoring(pipeline, grid)

    def limit(self, max_batch_size: int) -> None:
        """Sets how many texts a pass continues at most; before the first request."""
        self.batching.limit(max_batch_size)

    @property
    def capacity(self) -> int:
        """The most texts that run side by side."""
        return self.batching.capacity

    def forget(self) -> None:
        """Frees the keys and values of what was read, so that what comes next reads all anew.

        No request may run.
        """
        self.batching.forget()
        self.scoring.forget()

    @property
    def accepted(self) -> str:
        """How many of the tokens that were guessed from prompts were right."""
        right, all_of_them = self.batching.num_accepted, self.batching.num_drafted
        share = f" ({right / all_of_them:.0%})" if all_of_them else ""
        return f"{right:,} of {all_of_them:,} guessed tokens accepted{share}"

    def add(self, request: Request) -> int:
        """Adds a request, and returns the number under which `results` has its continuation.

        Raises:
            ConfigError: The prompt is empty, the continuation may have no token, or a beam search
                has more beams than fit.
        """
        if not request.prompt:
            raise ConfigError("a prompt has no token, and needs at least one", "give it a text")
        if request.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {request.max_new_tokens}, and must be at least 1",
                "give the length of the longest continuation, in tokens",
            )
        self._check_beams(request)
        number = self._count
        self._count += 1
        self.batching.add(number, request)
        return number

    def _check_beams(self, request: Request) -> None:
        """Checks that a beam search has room.

        Raises:
            ConfigError: It has not.
        """
        if request.beams is None:
            return
        count, most = request.beams.num_beams, self.batching.max_rows
        if count > most:
            raise ConfigError(
                f"{count} beams don't fit into the {most} rows of a pass",
                "give fewer beams (--num-beams) or a larger --max-batch-size",
            )
        found = request.beams.num_candidates(len(set(request.stop_ids)))
        if found > self.model.padded_vocab_size:
            raise ConfigError(
                f"{count} beams look at {found} tokens, and the vocabulary has "
                f"{self.model.padded_vocab_size}",
                "give fewer beams (--num-beams)",
            )

    @property
    def results(self) -> dict[int, Generation]:
        """The continuation of every request, as far as it has come, by its number."""
        return self.batching.results

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return self.batching.is_idle

    def is_open(self, number: int) -> bool:
        """Returns whether a request runs or waits.

        Args:
            number: The number that `add` has returned.
        """
        return self.batching.is_open(number)

    def end(self, number: int) -> None:
        """Ends a request, whether it runs or waits; it gets no further token.

        The ranks that share the model must end the same requests between the same steps.

        Args:
            number: The number that `add` has returned.
        """
        self.batching.end(number)

    @torch.inference_mode()
    def step(self) -> dict[int, list[int]]:
        """Makes the next tokens of requests that run, or of those that waited for room.

        With several pipeline stages the requests of one lane get theirs, and those of the other
        lanes in the steps after.

        Returns:
            The new tokens of requests, by their numbers: those of a beam search at its end, of
            others one after the other or a few at once. A stop token isn't among them, and a
            request that gets no token in this step is left out.

        Raises:
            CheckpointError: The logits of a request that `raises` are NaN.
            ConfigError: No token is allowed to such a request.
        """
        return self.batching.step()

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
                    silent = {n for n in silent - new.keys() if self.batching.is_open(n)}
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
        return [found.logprobs for found in self.ask_next(prompts, candidates)()]

    def ask_next(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> Callable[[], list[NextToken]]:
        """Begins to compute what the model expects after each prompt.

        A caller prepares the next prompts, or asks them, while the device and the other stages
        work. The ranks that share the model must wait in the order in which they ask.

        Args:
            prompts: The token ids of each prompt; at least one each.
            candidates: The token ids to score.

        Returns:
            A function that waits, and returns what was found for each prompt.
        """
        return self.scoring.ask_next(prompts, candidates)

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
        return self.ask_continuations(contexts, continuations)()

    def ask_continuations(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> Callable[[], list[tuple[float, bool]]]:
        """Begins to compute what `continuation_logprobs` returns, as `ask_next` does.

        Returns:
            A function that waits, and returns it; it raises CheckpointError if the logits are NaN.
        """
        return self.scoring.ask_continuations(contexts, continuations)

    def token_logprobs(
        self, rows: Sequence[Sequence[int]], count: int, adapter: str | None = None
    ) -> list[list[ScoredToken]]:
        """Scores each token of texts but the first, as what follows on those before it.

        Args:
            rows: The token ids of each text; at least one each.
            count: The number of likeliest tokens that are wanted beside each.
            adapter: The name of the adapter that is computed with; None for the bare model.

        Returns:
            The scores of each text's tokens, from the second on.

        Raises:
            CheckpointError: The logits are NaN.
        """
        return self.scoring.token_logprobs(rows, count, adapter)

    def all_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Returns the logits at every position of the prompts; None before the last stage.

        Args:
            prompts: The token ids of b prompts.

        Returns:
            The logits, [b, s, vocab], where s is the length of the longest prompt. Shorter prompts
            have zeros in front.
        """
        return self.scoring.all_logits(prompts)
