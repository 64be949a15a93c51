"""`Queries`: what the HTTP side has the engine do, and how much of it at once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

from glm3cli.infer.serve.orders import End, Order, Update
from glm3cli.infer.serve.protocol.errors import ApiError, StoppingError, TooBusyError

# Makes an order of the number of its sequence.
MakeOrder = Callable[[int], Order]
# The seconds after which a client that was refused may come again.
_LATER = 2


class Query:
    """What one request has the engine do: one sequence or several. A context manager."""

    def __init__(self, owner: "Queries", numbers: Sequence[int]) -> None:
        self._owner = owner
        self._places = {number: place for place, number in enumerate(numbers)}
        self._open = set(numbers)
        self._updates: asyncio.Queue[Update | ApiError] = asyncio.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def open_numbers(self) -> frozenset[int]:
        """The numbers of the sequences that haven't ended."""
        return frozenset(self._open)

    async def updates(self, patience: float) -> AsyncIterator[tuple[int, Update] | None]:
        """Yields what there is new of each sequence, with its place among them, until all end.

        Args:
            patience: The seconds without anything new after which None is yielded.

        Raises:
            ApiError: The server gives the query up.
        """
        while self._open or not self._updates.empty():
            try:
                found = await asyncio.wait_for(self._updates.get(), patience)
            except TimeoutError:
                yield None
                continue
            if isinstance(found, ApiError):
                raise found
            yield self._places[found.number], found

    def put(self, update: Update) -> None:
        """Takes an update of one of the sequences."""
        if update.finish is not None:
            self._open.discard(update.number)
        self._updates.put_nowait(update)

    def give_up(self, error: ApiError) -> None:
        """Makes `updates` raise an error."""
        self._updates.put_nowait(error)

    def close(self) -> None:
        """Ends the sequences that nobody waits for any more."""
        self._owner.close(self)
        self._open = set()


class Queries:
    """All that is under way. Everything but `stop` must be called in the event loop's thread.

    Attributes:
        room: The number of sequences that run side by side.
        is_stopping: Whether new queries are refused.
        idle: Is set while nothing is under way.
    """

    def __init__(self, put: Callable[[Sequence[Order]], None], room: int, max_queue: int) -> None:
        """Begins without queries.

        Args:
            put: Gives orders to the engine's thread.
            room: The number of sequences that run side by side.
            max_queue: The number of sequences that may wait for a place.
        """
        self.room = room
        self.is_stopping = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._put = put
        self._max_open = room + max_queue
        self._count = 0
        self._owners: dict[int, Query] = {}

    @property
    def num_running(self) -> int:
        """The number of sequences that have a place."""
        return min(len(self._owners), self.room)

    @property
    def num_waiting(self) -> int:
        """The number of sequences that wait for a place."""
        return len(self._owners) - self.num_running

    def open(self, makers: Sequence[MakeOrder]) -> Query:
        """Has the engine do something.

        Args:
            makers: What makes the orders, one for each sequence.

        Raises:
            ApiError: The server stops, too much is under way, or this alone would be too much.
        """
        if self.is_stopping:
            raise StoppingError("the server stops", _LATER)
        if len(makers) > self._max_open:
            raise ApiError(f"a request may have {self._max_open} answers, not {len(makers)}")
        if len(self._owners) + len(makers) > self._max_open:
            raise TooBusyError(
                f"{len(self._owners)} answers are under way or wait; try again later", _LATER
            )
        numbers = range(self._count, self._count + len(makers))
        self._count += len(makers)
        query = Query(self, numbers)
        self._owners |= dict.fromkeys(numbers, query)
        self._note()
        self._put([make(number) for make, number in zip(makers, numbers, strict=True)])
        return query

    def deliver(self, updates: Sequence[Update]) -> None:
        """Gives updates of the engine to the queries that wait for them."""
        for update in updates:
            query = self._owners.get(update.number)
            if query is None:  # has been closed since
                continue
            if update.finish is not None:
                del self._owners[update.number]
            query.put(update)
        self._note()

    def close(self, query: Query) -> None:
        """Ends what is left of a query."""
        numbers = query.open_numbers
        for number in numbers:
            self._owners.pop(number, None)
        if numbers:
            self._put([End(number) for number in numbers])
        self._note()

    def give_up(self, message: str) -> None:
        """Ends all queries with an error."""
        for query in set(self._owners.values()):
            query.give_up(StoppingError(message, _LATER))

    def _note(self) -> None:
        """Notes whether anything is under way."""
        if self._owners:
            self.idle.clear()
        else:
            self.idle.set()
