"""Which text has which row of the KV cache, and what the rows still hold of texts that have ended.

A prompt that begins as another text does, whether that one runs or has ended, gets the keys and
values of the common beginning by a copy, or takes over the row: an earlier turn of a chat, the
instruction that all prompts of a batch begin with, the examples before each question of a
benchmark. A copy costs as much as reading the tokens' share of the cache, 28 KiB each, and leaves
each row a run of slots that any attention kernel takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from glm3cli.infer.decoding.beams import BeamSearch
from glm3cli.infer.decoding.grammar import Matcher
from glm3cli.infer.requests import Request
from glm3cli.infer.steps import Steps
from glm3cli.model.cache import KVCache, bucket

# The fewest tokens in common that are worth a copy, or the wait for another row.
SHARED_AT_LEAST = 16
# The fewest slots of a row.
SMALLEST = 64
# The length of a continuation for which a row has slots from the start, if it may be so long.
_EXPECTED = 256


@dataclass(frozen=True)
class Held:
    """Tokens whose keys and values a row of the cache holds.

    Attributes:
        tokens: The token ids.
        adapter: The name of the adapter that they were computed with; None for none.
    """

    tokens: list[int]
    adapter: str | None = None


@dataclass
class Text:
    """A text that runs: a prompt and its continuation so far.

    Attributes:
        number: The number of its request.
        request: The request.
        generator: The request's random generator.
        tokens: The token ids of the prompt and of the continuation.
        lane: The lane whose cache holds its row.
        row: The row.
        cached: The number of tokens whose keys and values the row holds, or will hold when the
            passes that were begun have run.
        has_ended: Whether it has ended while a pass was under way.
        search: The beam search that it is a beam of; None if it is alone.
        matcher: Follows the grammar of the request; None without one.
        is_asleep: Whether it is a beam that hasn't parted from the first one yet.
    """

    number: int
    request: Request
    generator: torch.Generator
    tokens: list[int]
    lane: "Lane"
    row: int
    cached: int = 0
    has_ended: bool = False
    search: BeamSearch | None = None
    matcher: Matcher | None = None
    is_asleep: bool = False

    @property
    def new(self) -> list[int]:
        """The token ids of the continuation."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def whole(self) -> Held:
        """All of its tokens, whether they were read or not."""
        return Held(self.tokens, self.request.adapter)

    @property
    def held(self) -> Held:
        """The tokens that its row holds."""
        return Held(self.tokens[: self.cached], self.request.adapter)

    @property
    def needs_prefill(self) -> bool:
        """Whether tokens of the prompt were not read yet."""
        return not self.is_asleep and self.cached < len(self.request.prompt)

    @property
    def is_running(self) -> bool:
        """Whether its prompt was read, so that it can be continued."""
        return not self.is_asleep and self.cached >= len(self.request.prompt)


@dataclass
class Lane:
    """Texts that run side by side in one cache; a pipeline has as many lanes as stages.

    Attributes:
        cache: The keys and values of its rows.
        max_rows: The most rows of the cache.
        steps: The captured steps over the cache; None if the device captures none.
        texts: The texts that run, by row.
        held: The tokens whose keys and values a free row still holds, the row that has been free
            for longest first.
        is_busy: Whether a pass over its rows is under way.
        has_read: Whether its last pass has read prompts.
    """

    cache: KVCache
    max_rows: int
    steps: Steps | None = None
    texts: dict[int, Text] = field(default_factory=dict)
    held: dict[int, Held] = field(default_factory=dict)
    is_busy: bool = False
    has_read: bool = False

    @property
    def room(self) -> int:
        """The number of texts that could begin now."""
        return self.max_rows - len(self.texts)

    def begin(self, number: int, request: Request) -> Text:
        """Gives a request a row; there must be room."""
        prompt = list(request.prompt)
        if not self.held:
            rows = self.cache.num_rows
            self.cache.grow(min(bucket(rows + 1), self.max_rows), 0)
            self.held = {row: Held([]) for row in range(rows, self.cache.num_rows)}
        num_slots = len(prompt) + min(request.max_new_tokens, _EXPECTED)
        self.cache.grow(0, bucket(num_slots, SMALLEST))
        whole = Held(prompt, request.adapter)
        row = self._free_row(whole)
        text = Text(
            number=number,
            request=request,
            generator=torch.Generator().manual_seed(request.seed),
            tokens=prompt,
            lane=self,
            row=row,
            cached=_reusable(whole, self.held.pop(row)),
            matcher=request.grammar.begin() if request.grammar else None,
        )
        self.texts[row] = text
        return text

    def part(
        self, beams: list[Text], parents: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> None:
        """Lets each beam of a search go on from one of them, maybe another one.

        A beam from which several go on keeps its row for the first of them; the others get the rows
        of beams from which none does.

        Args:
            beams: The beams, whose order and tokens change.
            parents: The index of the beam from which each goes on.
            tokens: The new tokens of each beam then.
        """
        before = list(beams)
        free = [text for index, text in enumerate(before) if index not in parents]
        for index, parent in enumerate(parents):
            source = before[parent]
            beams[index] = source
            if parent in parents[:index]:
                text = beams[index] = free.pop()
                # The prompt is in every row but those of beams that haven't parted yet.
                start = 0 if text.is_asleep else len(text.request.prompt)
                self.cache.copy(self.cache, source.row, text.row, start, source.cached)
                text.cached, text.is_asleep = source.cached, False
        for text, new in zip(beams, tokens, strict=True):
            text.tokens = [*text.request.prompt, *new]

    def end(self, text: Text) -> None:
        """Frees the row of a text; the next prompts may go on from what it holds."""
        del self.texts[text.row]
        self.held[text.row] = text.held

    def clear(self, text: Text) -> None:
        """Overwrites what the row of a text holds, which ends: NaN would pass through masks."""
        self.cache.clear(text.row)
        text.cached = 0

    def forget(self) -> None:
        """Forgets what free rows hold."""
        self.held = {row: Held([]) for row in self.held}

    def readable(self) -> Iterator[tuple[int, Held]]:
        """Yields each row, and what it holds."""
        yield from self.held.items()
        for row, text in self.texts.items():
            yield row, text.held

    def _free_row(self, prompt: Held) -> int:
        """Returns the free row that a prompt can go on from.

        If there is none, the one whose tokens are least missed: one that holds none, or has been
        free for longest.
        """
        shared = {row: _reusable(prompt, held) for row, held in self.held.items()}
        best = max(shared, key=lambda row: shared[row])
        if shared[best]:
            return best
        empty = (row for row, held in self.held.items() if not held.tokens)
        return next(empty, next(iter(shared)))


def share_prefix(text: Text, lanes: Sequence[Lane]) -> bool:
    """Copies the beginning that a prompt has in common with another row, if it is worth it.

    Returns:
        Whether the prompt should wait, since one that is being read will soon have more in common
        with it than any row has now.
    """
    shared, lane, row = max(
        (
            (_reusable(text.whole, held), lane, row)
            for lane in lanes
            for row, held in lane.readable()
            if lane.texts.get(row) is not text
        ),
        key=lambda one: one[0],
        default=(0, text.lane, text.row),
    )
    if _awaited(text, lanes) >= max(shared, text.cached) + SHARED_AT_LEAST:
        return True
    if shared >= text.cached + SHARED_AT_LEAST:
        text.lane.cache.copy(lane.cache, row, text.row, text.cached, shared)
        text.cached = shared
    return False


def _awaited(text: Text, lanes: Sequence[Lane]) -> int:
    """Returns the longest beginning in common with a prompt that came before and is being read."""
    others = (other for lane in lanes for other in lane.texts.values())
    return max(
        (
            _reusable(text.whole, other.whole)
            for other in others
            if other.number < text.number and other.needs_prefill
        ),
        default=0,
    )


def _reusable(prompt: Held, held: Held) -> int:
    """Returns how many tokens of a prompt needn't be read where others were; 0 if it is too few.

    The last token of a prompt is always read: the next one is chosen by its logits. What another
    adapter has computed is of no use.
    """
    if prompt.adapter != held.adapter:
        return 0
    return shared_length(prompt.tokens, held.tokens, len(prompt.tokens) - 1)


def shared_length(first: Sequence[int], second: Sequence[int], most: int) -> int:
    """Returns how many tokens two texts begin with alike; 0 if they aren't worth a copy.

    Args:
        first: The token ids of a text.
        second: The token ids of the other one, in the same kind of sequence.
        most: The most tokens that count.
    """
    low, high = 0, min(most, len(first), len(second))
    if high <= 0 or first[0] != second[0]:
        return 0
    while low < high:  # halves the part in which the first difference is
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low if low >= SHARED_AT_LEAST else 0
