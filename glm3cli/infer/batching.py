"""`Batching`: which requests run side by side, and what the next forward pass does.

A pass either reads prompts, as many of their tokens as fit into a chunk, or continues every text of
a lane. With several pipeline stages there are as many lanes, whose passes follow each other through
the stages: while the last stage works on one, the first works on the next. Each lane may have as
many texts as one pass takes without stages: half as many would take a stage, which reads its
weights in each pass, far longer than half the time, and as each rank caches the keys and values of
its own layers alone, the lanes together need no more memory on it. A text that ends leaves its row
at once to one that waits.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from glm3cli.errors import Glm3Error
from glm3cli.infer.decoding.beams import BeamSearch, Candidate
from glm3cli.infer.decoding.choice import Chooser, Chosen, Fork, Place, read
from glm3cli.infer.decoding.lookup import find_draft
from glm3cli.infer.pipeline import Arriving, Pipeline
from glm3cli.infer.requests import Generation, Request, generation_of
from glm3cli.infer.rows import SMALLEST, Lane, Text, share_prefix
from glm3cli.model.cache import Run, bucket

# The most tokens of prompts that one pass reads.
CHUNK = 1024


@dataclass(frozen=True)
class _Part:
    """What a pass reads of a text.

    Attributes:
        text: The text.
        tokens: The tokens to read: a part of the prompt, or the last token and a draft of the next.
        is_last: Whether the text goes on after them.
    """

    text: Text
    tokens: list[int]
    is_last: bool

    @property
    def draft(self) -> list[int]:
        """The tokens that were guessed and are read beforehand."""
        return self.tokens[len(self.text.tokens) - self.text.cached :] if self.is_last else []


@dataclass(frozen=True)
class _Flight:
    """A pass whose tokens are under way from the last stage.

    Attributes:
        lane: The lane whose rows it works on.
        drafts: The texts that get tokens, each with its draft, in the order of `places`.
        places: The places at which tokens are chosen: for each text one more than its draft has
            tokens.
        groups: The texts of beam searches, in the order of `forks`.
        forks: The forks of these searches.
        chosen: What was chosen.
    """

    lane: Lane
    drafts: list[tuple[Text, list[int]]]
    places: list[Place]
    groups: list[list[Text]]
    forks: list[Fork]
    chosen: Arriving

    @property
    def texts(self) -> list[Text]:
        """The texts that get tokens by the pass."""
        return [*(text for text, _ in self.drafts), *chain.from_iterable(self.groups)]

    def has(self, text: Text) -> bool:
        """Returns whether the pass works on the row of a text that gets a token by it."""
        return any(text is one for one in self.texts)


class Batching:
    """The requests that run and wait on this rank, the same on all that share the model.

    Attributes:
        results: The continuation of every request by its number.
        chunk: The most tokens of prompts that one pass reads.
        num_drafted: The number of tokens that were guessed so far.
        num_accepted: How many of them were right.
        lanes: The texts that run.
    """

    def __init__(
        self, pipeline: Pipeline, chooser: Chooser, num_lanes: int, max_batch_size: int
    ) -> None:
        """Makes a batch without requests.

        Args:
            pipeline: Runs the forward passes.
            chooser: Chooses the tokens.
            num_lanes: The number of pipeline stages.
            max_batch_size: The most texts of a lane.
        """
        self.results: dict[int, Generation] = {}
        self.chunk = CHUNK
        self.num_drafted = self.num_accepted = 0
        self._pipeline, self._chooser = pipeline, chooser
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, list[Text]] = {}
        self._flights: deque[_Flight] = deque()
        caches = [pipeline.new_cache(for_steps=True) for _ in range(num_lanes)]
        self.lanes = [Lane(cache, 0, pipeline.new_steps(cache)) for cache in caches]
        self.limit(max_batch_size)

    @property
    def max_rows(self) -> int:
        """The most texts of a lane."""
        return self.lanes[0].max_rows

    @property
    def capacity(self) -> int:
        """The most texts that run side by side."""
        return self.max_rows * len(self.lanes)

    def limit(self, max_batch_size: int) -> None:
        """Sets how many texts a lane has at most; before the first request."""
        for lane in self.lanes:
            lane.max_rows = max_batch_size

    def forget(self) -> None:
        """Frees the keys and values of texts that have ended; no request may run."""
        while self._flights:
            self._land()
        for lane in self.lanes:
            lane.cache, lane.held, lane.has_read = self._pipeline.new_cache(), {}, False

    def add(self, number: int, request: Request) -> None:
        """Adds a request."""
        self.results[number] = Generation()
        self._waiting[number] = request

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self._running and not self._waiting

    def is_open(self, number: int) -> bool:
        """Returns whether a request runs or waits."""
        return number in self._running or number in self._waiting

    def end(self, number: int) -> None:
        """Ends a request, whether it runs or waits."""
        self._waiting.pop(number, None)
        if number in self._running:
            self._leave(number, "stop")

    def step(self) -> dict[int, list[int]]:
        """Begins passes until each stage has one, and returns the tokens of the first of them."""
        while len(self._flights) < len(self.lanes) and self._launch():
            pass
        return self._land() if self._flights else {}

    def _launch(self) -> bool:
        """Begins the next pass, if there is one to begin."""
        self._admit()
        for lane in self.lanes:
            if lane.is_busy or not lane.texts:
                continue
            reading = self._unread(lane)
            # Passes take turns, so that a long prompt doesn't hold up those that run.
            if not reading or lane.has_read:
                running = [text for text in lane.texts.values() if text.is_running]
                reading = [self._next(text) for text in running] or reading
                lane.has_read = not running
            else:
                lane.has_read = True
            if reading:
                self._run(lane, reading)
                self.lanes.remove(lane)  # the others come first next time
                self.lanes.append(lane)
                return True
        return False

    def _admit(self) -> None:
        """Gives rows to requests that wait, as long as there is room."""
        while self._waiting:
            number, request = next(iter(self._waiting.items()))
            count = request.beams.num_beams if request.beams else 1
            lane = max(self.lanes, key=lambda lane: lane.room)
            if lane.room < count:
                return
            del self._waiting[number]
            texts = [lane.begin(number, request) for _ in range(count)]
            if request.beams:
                search = BeamSearch(request.beams, request.max_new_tokens)
                for text in texts:
                    text.search, text.is_asleep = search, text is not texts[0]
            self._running[number] = texts

    def _unread(self, lane: Lane) -> list[_Part]:
        """Returns what the next pass reads of prompts."""
        room, found = self.chunk, []
        for text in sorted(lane.texts.values(), key=lambda text: text.number):
            if room and text.needs_prefill and not share_prefix(text, self.lanes):
                end = min(text.cached + room, len(text.tokens))
                room -= end - text.cached
                tokens = text.tokens[text.cached : end]
                found.append(_Part(text, tokens, end == len(text.tokens)))
        return found

    def _next(self, text: Text) -> _Part:
        """Returns what a pass reads of a text that runs: its last token, and a draft."""
        request, last = text.request, text.tokens[text.cached :]
        room = request.max_new_tokens - len(text.new) - 1
        draft = find_draft(text.tokens, min(request.lookup, room)) if request.lookup else []
        return _Part(text, [*last, *draft], is_last=True)

    def _run(self, lane: Lane, parts: Sequence[_Part]) -> None:
        """Begins a pass."""
        # The logits of beams come last, those of one search side by side.
        parts = sorted(parts, key=self._order)
        runs = [
            Run(part.text.row, part.text.cached, part.tokens, part.text.request.adapter)
            for part in parts
        ]
        wanted: list[int] = []
        count = 0
        for part in parts:
            count += len(part.tokens)
            if part.is_last:
                wanted += range(count - len(part.draft) - 1, count)
        length = bucket(max(run.end for run in runs), SMALLEST)
        lane.cache.grow(0, length)
        drafts = [(part.text, part.draft) for part in parts if part.is_last]
        if lane.steps is not None and count == len(runs) == len(wanted):
            logits = self._pipeline.step(runs, lane.steps, length)
        else:
            logits = self._pipeline.forward(runs, lane.cache, wanted)
        for part in parts:
            part.text.cached += len(part.tokens) - len(part.draft)
        if wanted:
            self._choose(lane, drafts, logits)

    def _order(self, part: _Part) -> tuple[bool, int, int]:
        """Returns where a text stands among those of a pass, and a beam among those of a search."""
        text = part.text
        group = [id(one) for one in self._running[text.number]]
        return text.search is not None, text.number, group.index(id(text))

    def _choose(
        self, lane: Lane, drafts: list[tuple[Text, list[int]]], logits: Tensor | None
    ) -> None:
        """Begins to choose the next tokens of texts."""
        plain = [(text, draft) for text, draft in drafts if text.search is None]
        numbers = dict.fromkeys(text.number for text, _ in drafts if text.search is not None)
        groups = [self._running[number] for number in numbers if number in self._running]
        places = [
            _place(text, draft[:size]) for text, draft in plain for size in range(len(draft) + 1)
        ]
        forks = [_fork(group) for group in groups]
        chosen = self._chooser.choose(logits, places, forks)
        arriving = self._pipeline.from_last_stage(chosen)
        self._flights.append(_Flight(lane, plain, places, groups, forks, arriving))
        lane.is_busy = True

    def _land(self) -> dict[int, list[int]]:
        """Waits for the tokens of the pass that was begun first, and returns them.

        Raises:
            CheckpointError: The logits of a request that `raises` are NaN.
            ConfigError: No token is allowed to such a request.
        """
        flight = self._flights.popleft()
        flight.lane.is_busy = False
        try:
            return self._tokens(flight)
        except Glm3Error:  # the logits of those that weren't looked at any more may be NaN, too
            for text in flight.texts:
                if flight.lane.texts.get(text.row) is text:
                    flight.lane.clear(text)
            raise

    def _tokens(self, flight: _Flight) -> dict[int, list[int]]:
        """Returns the tokens of a pass, and goes on with its texts or ends them."""
        new: dict[int, list[int]] = {}
        chosen, candidates = read(flight.chosen.wait(), flight.places, flight.forks)
        first = 0
        for text, draft in flight.drafts:
            found = chosen[first : first + len(draft) + 1]
            first += len(found)
            if text.has_ended:
                flight.lane.end(text)
            elif tokens := self._extend(text, draft, found):
                new[text.number] = tokens
        for group, forked in zip(flight.groups, candidates, strict=True):
            if group[0].has_ended:
                for text in group:
                    flight.lane.end(text)
            elif tokens := self._fork(flight.lane, group, forked):
                new[group[0].number] = tokens
        return new

    def _extend(self, text: Text, draft: list[int], chosen: list[Chosen]) -> list[int]:
        """Adds tokens to a text: those of the draft that were chosen, and the one after them.

        Returns:
            The new tokens.

        Raises:
            CheckpointError: The logits are NaN.
            ConfigError: No token is allowed.
        """
        request, result = text.request, self.results[text.number]
        new: list[int] = []
        self.num_drafted += len(draft)
        for place, one in enumerate(chosen):
            if one.problem is not None:
                if request.raises:
                    raise one.problem
                text.lane.clear(text)
                result.problem = one.problem
                self._leave(text.number, "error")
                break
            if one.token in request.stop_ids:
                self._leave(text.number, "stop")
                break
            text.tokens.append(one.token)
            new.append(one.token)
            result.add(one.token, one.logprob, one.top if request.logprobs else None)
            if request.is_end is not None and request.is_end(result.token_ids):
                self._leave(text.number, "stop_text")
                break
            if len(result.token_ids) == request.max_new_tokens:
                self._leave(text.number, "length")
                break
            if place == len(draft) or draft[place] != one.token:
                break
            text.cached += 1  # the pass has read this one, too
            self.num_accepted += 1
        return new

    def _fork(self, lane: Lane, group: list[Text], found: list[Candidate]) -> list[int]:
        """Lets a beam search go on; returns the best text's tokens when it is done."""
        request, search = group[0].request, group[0].search
        assert search is not None
        parents = search.advance(found, request.is_last)
        if parents is None:
            number = group[0].number
            first, *others = (
                generation_of(one, request) for one in search.ended[: search.rule.num_return]
            )
            first.others = others
            self.results[number] = first
            del self._running[number]
            for text in group:
                lane.end(text)
            return self.results[number].token_ids
        lane.part(group, parents, search.beams)
        return []

    def _leave(self, number: int, reason: str) -> None:
        """Ends a request; its rows are free when no pass works on them any more."""
        self.results[number].finish_reason = reason
        for text in self._running.pop(number):
            if any(flight.has(text) for flight in self._flights):
                text.has_ended = True
            else:
                text.lane.end(text)


def _place(text: Text, draft: Sequence[int] = ()) -> Place:
    """Returns the place at which the token after a text, and a part of its draft, is chosen."""
    request = text.request
    new = [*text.new, *draft]
    rule, count = request.sampling, request.logprobs
    return Place(rule, text.generator, request.prompt, new, count, text.matcher)


def _fork(group: Sequence[Text]) -> Fork:
    """Returns the fork of a beam search."""
    request, search = group[0].request, group[0].search
    assert search is not None
    num_ends = len(set(request.stop_ids))
    return Fork(
        places=[_place(text) for text in group if not text.is_asleep],
        scores=search.scores,
        count=search.rule.num_candidates(num_ends),
        keep=max(2, num_ends + 1),
    )
