"""`Model`: an opened model with its tokenizer, from prompts to texts and log-probabilities.

The commands use it as programs do (`glm3cli.open_model`). Under torchrun every rank calls the same
methods with the same arguments and gets the same results.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self, TypeVar

import torch.distributed as dist

from glm3cli.data.tokens.chat import Message, build_prompt
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.infer.engine import Engine, Generation, Timing
from glm3cli.infer.sampling import Sampling

GREEDY = Sampling(greedy=True)
# Takes a piece of text as soon as it is certain.
OnText = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt, or the answer to it.

    Attributes:
        prompt: The prompt, as it was given.
        text: The new text.
        token_ids: The new tokens.
        finish_reason: `stop` where the model has ended its text, `length` at the limit.
        logprobs: The log-probability of each new token before temperature and filters.
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]


class Model:
    """An opened model on this rank; a context manager, which closes it.

    Attributes:
        engine: Works on token ids.
        tokenizer: Turns text into token ids and back.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, closing: ExitStack) -> None:
        """Takes also what lets go of the process groups."""
        self.engine = engine
        self.tokenizer = tokenizer
        self._closing = closing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the other ranks and frees the process groups; the model can't be used after."""
        self._closing.close()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 42,
        answer: bool = False,
        on_text: OnText | None = None,
        timing: Timing | None = None,
    ) -> list[Completion]:
        """Continues texts, or answers them as questions.

        Data parallel ranks share the prompts; a prompt's random numbers depend on its place in the
        whole list alone.

        Args:
            prompts: One text or several.
            max_new_tokens: The length of the longest continuation, in tokens.
            sampling: The rule by which tokens are drawn; the likeliest token unless given.
            seed: Prompt i draws from a generator seeded with seed + i.
            answer: Ask each prompt as a user's turn instead of continuing it.
            on_text: Called on rank 0 with the first prompt's text, piece by piece.
            timing: Is filled with the time taken on this rank.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self._prompt_ids(text, answer=answer) for text in texts]
        grid = self.engine.grid
        stride = -(-len(ids) // grid.dp_size)
        mine = range(grid.dp_rank * stride, min((grid.dp_rank + 1) * stride, len(ids)))
        generations: list[Generation] = []
        if mine:
            generations = self.continue_ids(
                [ids[row] for row in mine],
                max_new_tokens,
                sampling,
                seed + mine.start,
                on_text,
                timing,
            )
        found = [
            self._completion(texts[row], generation)
            for row, generation in zip(mine, generations, strict=True)
        ]
        gathered: list[list[Completion]] = [[] for _ in range(grid.dp_size)]
        dist.all_gather_object(gathered, found, group=grid.dp_group)
        return [completion for part in gathered for completion in part]

    def continue_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 42,
        on_text: OnText | None = None,
        timing: Timing | None = None,
    ) -> list[Generation]:
        """Continues prompts of token ids on this model copy, up to where an answer ends.

        Args:
            prompts: The token ids of each prompt.
            max_new_tokens: The length of the longest continuation, in tokens.
            sampling: The rule by which tokens are drawn.
            seed: Prompt i draws from a generator seeded with seed + i.
            on_text: Called on rank 0 with the first prompt's text, piece by piece.
            timing: Is filled with the time taken.
        """
        decoder = self.tokenizer.stream_decoder()
        speaks = on_text is not None and self.engine.grid.rank == 0

        def show(tokens: list[int | None]) -> None:
            if on_text is not None and speaks and tokens[0] is not None:
                on_text(decoder.push(tokens[0]))

        generations = self.engine.generate(
            prompts,
            sampling,
            max_new_tokens,
            stop_ids(self.tokenizer),
            seed=seed,
            on_tokens=show,
            timing=timing,
        )
        if on_text is not None and speaks:
            on_text(decoder.finish())
        return generations

    def logprobs(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """Returns the log-probability of each continuation after its context.

        Args:
            contexts: The texts that come before; may be empty strings.
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
        """Returns what rank 0 has for `value`; every rank calls it."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def _prompt_ids(self, prompt: str, *, answer: bool) -> list[int]:
        if answer:
            return build_prompt(self.tokenizer, [Message("user", prompt)])
        return [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)]

    def _completion(self, prompt: str, generation: Generation) -> Completion:
        return Completion(
            prompt=prompt,
            text=self.tokenizer.decode(generation.token_ids),
            token_ids=generation.token_ids,
            finish_reason=generation.finish_reason,
            logprobs=generation.logprobs,
        )


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens at which an answer ends: eos, or the role that speaks next."""
    roles = ("<|user|>", "<|observation|>")
    return [tokenizer.eos_id, *(tokenizer.special(role) for role in roles)]
