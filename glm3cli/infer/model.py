"""`Model`: an opened model with its tokenizer, which continues texts and scores them.

Commands and programs (`glm3cli.open_model`) use it alike. On several ranks, all must call the same
methods with the same arguments, and get the same results.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self, TypeVar

import torch.distributed as dist

from glm3cli.data.tokens.chat import build_prompt
from glm3cli.data.tokens.messages import Message
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import ConfigError
from glm3cli.infer.decoding.grammar import text_of
from glm3cli.infer.decoding.rules import Decoding
from glm3cli.infer.decoding.stops import StopStream, StopTexts
from glm3cli.infer.engine import Engine
from glm3cli.infer.requests import Generation, Request, Timing
from glm3cli.infer.sampling import Sampling

GREEDY = Sampling(greedy=True)
# Gets a piece of text as soon as no further token can change it.
OnText = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt, or the answer to it.

    Attributes:
        prompt: The prompt as the caller gave it.
        text: The new text.
        token_ids: The ids of the new tokens.
        finish_reason: `stop` where the model has ended its text, `stop_text` where a given text
            has, `length` where the limit has.
        logprobs: The log-probability (natural logarithm) of each new token, before the sampling
            rule changes it.
        index: The number of the continuation among those of its prompt, from 0 on.
        top_logprobs: The likeliest tokens at each place with their log-probabilities, if wanted.
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]
    index: int = 0
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)


class Model:
    """An opened model on this rank; a context manager, which closes it.

    Attributes:
        engine: The part of the model on this rank, which works on token ids.
        tokenizer: Turns text into token ids and back.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, closing: ExitStack) -> None:
        """Opens a model; `closing` frees the process groups when it is closed."""
        self.engine = engine
        self.tokenizer = tokenizer
        self._closing = closing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the process groups; the model can't be used after."""
        self._closing.close()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 42,
        answer: bool = False,
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
        timing: Timing | None = None,
    ) -> list[Completion]:
        """Continues texts, or answers them as questions.

        Data parallel ranks share the prompts. The random numbers of a prompt depend on its place
        in the list alone, not on the number of ranks.

        Args:
            prompts: One text or several.
            max_new_tokens: The length of the longest continuation, in tokens.
            sampling: The rule by which tokens are drawn; greedy unless given.
            seed: The seed of the random numbers; prompt i gets a generator seeded with seed + i.
            answer: Whether each prompt is the turn of a user in a chat, for the model to answer.
            stop: Texts before which a continuation ends.
            on_text: Called on rank 0 with the first prompt's text, piece by piece.
            timing: Is filled with the time that this rank's prompts took.

        Returns:
            The continuation of each prompt, in the order of the prompts.

        Raises:
            ConfigError: A prompt is longer than the model's positions, or `max_new_tokens` is less
                than 1.
            CheckpointError: The logits are NaN.
        """
        decoding = Decoding(sampling, max_new_tokens, stops=tuple(stop))
        return self.decode(
            prompts, decoding, seed=seed, answer=answer, on_text=on_text, timing=timing
        )

    def decode(
        self,
        prompts: str | Sequence[str],
        decoding: Decoding,
        *,
        seed: int = 42,
        answer: bool = False,
        truncate: bool = False,
        on_text: OnText | None = None,
        timing: Timing | None = None,
    ) -> list[Completion]:
        """Continues texts as `generate` does, with all that can be said about how.

        Args:
            prompts: One text or several.
            decoding: How the continuations are made.
            seed: The seed of the random numbers; of n continuations of each prompt, number j of
                prompt i gets a generator seeded with seed + i n + j.
            answer: Whether each prompt is the turn of a user in a chat, for the model to answer.
            truncate: Whether a prompt that is longer than the model's positions loses its
                beginning; if not, it is an error.
            on_text: Called on rank 0 with the first prompt's text, piece by piece.
            timing: Is filled with the time that this rank's prompts took.

        Returns:
            The continuations of each prompt, in the order of the prompts.

        Raises:
            ConfigError: A prompt is longer than the model's positions, or the rules make no sense.
            CheckpointError: The logits are NaN.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [
            self.fitting(self.prompt_ids(text, answer=answer), truncate=truncate) for text in texts
        ]
        grid, count = self.engine.grid, decoding.num_sequences
        stride = -(-len(ids) // grid.dp_size)
        mine = range(grid.dp_rank * stride, min((grid.dp_rank + 1) * stride, len(ids)))
        requests = [self.requests(ids[row], decoding, seed + row * count) for row in mine]
        stream = StopStream(self.tokenizer, decoding.stops)
        speaks = on_text is not None and grid.rank == 0

        def show(tokens: list[list[int]]) -> None:
            if on_text is not None and speaks:
                on_text("".join(map(stream.push, tokens[0])))

        flat = [request for group in requests for request in group]
        found = iter(self.engine.answer(flat, show, timing) if flat else [])
        if on_text is not None and speaks and flat:
            on_text(stream.finish())
        completions = []
        for row, group in zip(mine, requests, strict=True):
            generations = [next(found) for _ in group]
            generations = [one for first in generations for one in (first, *first.others)]
            for index, generation in enumerate(generations):
                completions.append(self._completion(texts[row], generation, decoding, index))
        gathered: list[list[Completion]] = [[] for _ in range(grid.dp_size)]
        dist.all_gather_object(gathered, completions, group=grid.dp_group)
        return [completion for part in gathered for completion in part]

    def continue_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 42,
    ) -> list[Generation]:
        """Continues prompts of token ids until an answer would end.

        Unlike `generate`, data parallel ranks don't share the prompts: each continues its own.

        Args:
            prompts: The token ids of each prompt.
            max_new_tokens: The length of the longest continuation, in tokens.
            sampling: The rule by which tokens are drawn; greedy unless given.
            seed: The seed of the random numbers; prompt i gets a generator seeded with seed + i.

        Returns:
            The continuation of each prompt, in the order of the prompts.
        """
        ends = stop_ids(self.tokenizer)
        return self.engine.generate(prompts, sampling, max_new_tokens, ends, seed=seed)

    def requests(self, prompt: Sequence[int], decoding: Decoding, seed: int) -> list[Request]:
        """Returns the requests for a prompt."""
        return decoding.requests(prompt, self.tokenizer, stop_ids(self.tokenizer), seed)

    def fitting(self, ids: list[int], *, truncate: bool = False) -> list[int]:
        """Returns the token ids of a prompt, without its beginning if it is too long.

        Raises:
            ConfigError: It is too long, and nothing may be left out.
        """
        room = self.engine.model.seq_length
        if len(ids) <= room:
            return ids
        if not truncate:
            raise ConfigError(
                f"a prompt has {len(ids):,} tokens, and the model takes {room:,} "
                "(seq_length of its config.json)",
                "give a shorter prompt, or --truncate, which leaves out its beginning",
            )
        prefix = list(self.tokenizer.prefix)
        return [*prefix, *ids[len(ids) - room + len(prefix) :]]

    def logprobs(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """Returns the log-probability of each continuation after its context.

        It is the sum of those of the continuation's tokens, in natural logarithms.

        Args:
            contexts: The texts that come before; they may be empty.
            continuations: The texts to score, one for each context.
        """
        prefix = list(self.tokenizer.prefix)
        before, after = [], []
        for context, continuation in zip(contexts, continuations, strict=True):
            whole = self.tokenizer.encode(context + continuation)
            start = len(self.tokenizer.encode(context)) if context else 0
            before.append([*prefix, *whole[:start]])
            after.append(whole[start:])
        return [score for score, _ in self.engine.continuation_logprobs(before, after)]

    def from_rank_0(self, value: T) -> T:
        """Returns the `value` that rank 0 has; every rank must call it."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def prompt_ids(self, prompt: str, *, answer: bool) -> list[int]:
        """Returns the token ids of a prompt, as the turn of a user if it is to be answered."""
        if answer:
            return build_prompt(self.tokenizer, [Message("user", prompt)])
        return [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)]

    def _completion(
        self, prompt: str, generation: Generation, decoding: Decoding, index: int
    ) -> Completion:
        """Returns a continuation of a prompt, with its text."""
        text = self.tokenizer.decode(generation.token_ids)
        if decoding.grammar:  # which has read the space that a text may begin with
            text = text_of(self.tokenizer, generation.token_ids)
        return Completion(
            prompt=prompt,
            text=StopTexts(self.tokenizer, decoding.stops).cut(text),
            token_ids=generation.token_ids,
            finish_reason=generation.finish_reason,
            logprobs=generation.logprobs,
            index=index,
            top_logprobs=generation.top_logprobs,
        )


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the tokens that end an answer: eos, and the roles that may speak next."""
    return list(tokenizer.ends)
