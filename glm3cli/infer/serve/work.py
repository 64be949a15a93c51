"""`Worker`: runs the orders of the HTTP side on the engine, on all ranks of a copy alike.

Rank 0 calls `lead`, the first ranks of other copies `lead_copy`, and all others `follow`. While
there is nothing to do, these wait for the store that all ranks share; in between, the first rank of
their copy tells them before each step what is new.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection

from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.infer.engine import Engine
from glm3cli.infer.model import Model
from glm3cli.infer.serve.orders import Begin, End, Order, Score, Token, Update
from glm3cli.parallel.orders import Orders

# The most tokens that are scored between two steps, so that answers don't stand still for long.
_SCORED_AT_ONCE = 1024

# Gets what there is new after a step.
OnUpdates = Callable[[list[Update]], None]


class Inbox:
    """Orders that wait for the next step; the one thread puts them in, the other takes them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._orders: list[Order] = []
        self._is_closed = False
        self._error: Exception | None = None

    def put(self, orders: Sequence[Order]) -> None:
        """Adds orders."""
        with self._changed:
            self._orders += orders
            self._changed.notify()

    def close(self) -> None:
        """Ends the work before the next step, whatever still runs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def fail(self, error: Exception) -> None:
        """Ends the work before the next step by an error, unless it is closed."""
        with self._changed:
            self._error = None if self._is_closed else error
            self._is_closed = True
            self._changed.notify()

    def take(self, *, waits: bool) -> list[Order] | None:
        """Takes the orders out; None after `close`.

        Args:
            waits: Whether to wait until there is an order.

        Raises:
            Exception: The error that `fail` was given.
        """
        with self._changed:
            while waits and not self._orders and not self._is_closed:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            orders, self._orders = self._orders, []
            return None if self._is_closed else orders


class Worker:
    """The engine of this rank, and the sequences that it works on."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._engine: Engine = model.engine
        self._running: dict[int, int] = {}  # the engine's numbers by ours
        self._num_told: dict[int, int] = {}  # tokens, by our numbers
        self._scores: deque[Score] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do until the next order."""
        return not self._running and not self._scores

    def work(self, orders: Sequence[Order]) -> list[Update]:
        """Takes orders, makes a step, and returns what there is new."""
        updates = [update for order in orders if (update := self._take(order))]
        if self._scores:
            updates += self._score()
        if self._running:
            self._engine.step()
            updates += self._new()
        return updates

    def _take(self, order: Order) -> Update | None:
        """Begins or ends a sequence; returns an update if it can't be begun."""
        match order:
            case Begin():
                try:
                    [request] = self._model.requests(order.prompt, order.decoding, order.seed)
                    request = replace(request, raises=False, adapter=order.adapter)
                    number = self._engine.add(request)
                except ConfigError as error:
                    return Update(order.number, [], "error", error.message)
                self._running[order.number] = number
                self._num_told[order.number] = 0
            case Score():
                self._scores.append(order)
            case End():
                self._scores = deque(one for one in self._scores if one.number != order.number)
                if order.number in self._running:
                    self._engine.end(self._running[order.number])
                    self._forget(order.number)
        return None

    def _forget(self, number: int) -> None:
        """Drops all that is known of a sequence that has ended."""
        self._engine.results.pop(self._running.pop(number))
        del self._num_told[number]

    def _new(self) -> list[Update]:
        """Returns the new tokens of the sequences that run, and takes out those that have ended."""
        updates = []
        for number, inner in list(self._running.items()):
            found, start = self._engine.results[inner], self._num_told[number]
            is_open = self._engine.is_open(inner)
            if is_open and len(found.token_ids) == start:
                continue
            tokens = [
                Token(
                    token,
                    found.logprobs[place] if found.logprobs else None,
                    found.top_logprobs[place] if found.top_logprobs else [],
                )
                for place, token in enumerate(found.token_ids[start:], start)
            ]
            self._num_told[number] = len(found.token_ids)
            finish = None if is_open else found.finish_reason
            problem = found.problem.message if found.problem else ""
            updates.append(Update(number, tokens, finish, problem))
            if not is_open:
                self._forget(number)
        return updates

    def _score(self) -> list[Update]:
        """Scores some of the texts that wait for it."""
        count, adapter = self._scores[0].count, self._scores[0].adapter
        chosen, room = list[Score](), _SCORED_AT_ONCE
        while self._scores and (self._scores[0].count, self._scores[0].adapter) == (count, adapter):
            if chosen and len(self._scores[0].tokens) > room:
                break
            chosen.append(self._scores.popleft())
            room -= len(chosen[-1].tokens)
        return self._scored(chosen)

    def _scored(self, chosen: Sequence[Score]) -> list[Update]:
        """Scores texts with as many likeliest tokens and the same adapter."""
        first, rows = chosen[0], [one.tokens for one in chosen]
        try:
            found = self._engine.token_logprobs(rows, first.count, first.adapter)
        except CheckpointError as error:
            if len(chosen) > 1:  # the others have nothing to do with it
                return [update for one in chosen for update in self._scored([one])]
            return [Update(first.number, [], "error", error.message)]
        return [
            Update(
                order.number,
                [
                    Token(order.tokens[0]),
                    *(Token(one.token, one.logprob, one.top) for one in scored),
                ],
                "scored",
            )
            for order, scored in zip(chosen, found, strict=True)
        ]


def lead(worker: Worker, ranks: Orders, inbox: Inbox, on_updates: OnUpdates) -> None:
    """Works on a copy's first rank until the inbox is closed, and tells the others what to do.

    Args:
        worker: The worker of this rank.
        ranks: The way to the other ranks of the copy.
        inbox: Where orders come from.
        on_updates: Called with what there is new, after each step with any.
    """
    while True:
        was_idle = worker.is_idle
        orders = inbox.take(waits=was_idle)
        if was_idle:
            ranks.send(orders)
        else:
            ranks.share((orders,) if orders or orders is None else None)
        if orders is None:
            return
        if updates := worker.work(orders):
            on_updates(updates)


def lead_copy(worker: Worker, ranks: Orders, link: Connection) -> None:
    """Works on the first rank of a copy that isn't rank 0's, until rank 0 ends.

    Args:
        worker: The worker of this rank.
        ranks: The way to the other ranks of the copy.
        link: The connection to rank 0.
    """
    inbox = Inbox()

    def hear() -> None:
        with suppress(EOFError, OSError):  # rank 0 has ended without a word
            while (orders := link.recv()) is not None:
                inbox.put(orders)
        inbox.close()

    threading.Thread(target=hear, daemon=True).start()
    with link, suppress(BrokenPipeError, ConnectionResetError):
        lead(worker, ranks, inbox, link.send)


def follow(worker: Worker, ranks: Orders) -> None:
    """Works on any other rank until the first one of its copy ends."""
    while True:
        if worker.is_idle:
            orders = ranks.receive()
        else:
            [orders] = ranks.share() or [[]]
        if orders is None:
            return
        worker.work(orders)
