"""`Copies`: shares sequences out among the copies of the model, each of which has an engine.

A sequence goes where the fewest are under way, unless another copy that has room has read the
beginning of its prompt, such as the earlier turns of a chat, whose keys and values are kept there.
"""

from collections.abc import Callable, Sequence

from glm3cli.infer.serve.orders import Begin, End, Order, Score, Update

Put = Callable[[Sequence[Order]], None]
# Beginnings are known by their first 64, 128, 256, ... tokens; so many of them.
_LEAST_BEGINNING = 64
_MOST_BEGINNINGS = 4096


class Copies:
    """Shares orders out among the copies. Its methods must be called in one thread.

    Attributes:
        loads: The number of sequences that are under way in each copy.
    """

    def __init__(self, puts: Sequence[Put], places: int) -> None:
        """Begins without sequences.

        Args:
            puts: Give orders to the copies.
            places: The number of sequences that run side by side in each.
        """
        self._puts = puts
        self._places = places
        self._copies: dict[int, int] = {}  # of the sequences that are under way, by their numbers
        self._homes: dict[int, int] = {}  # the copies that have read beginnings, oldest first
        self.loads = [0] * len(puts)

    def put(self, orders: Sequence[Order]) -> None:
        """Gives orders to the copies that they belong to."""
        shares: list[list[Order]] = [[] for _ in self._puts]
        for order in orders:
            if isinstance(order, End):
                copy = self._end(order.number)
            else:
                copy = self._copies[order.number] = self._choose(order)
                self.loads[copy] += 1
            if copy is not None:
                shares[copy].append(order)
        for put, share in zip(self._puts, shares, strict=True):
            if share:
                put(share)

    def note(self, updates: Sequence[Update]) -> None:
        """Takes note of sequences that have ended."""
        for update in updates:
            if update.finish is not None:
                self._end(update.number)

    def _end(self, number: int) -> int | None:
        """Forgets a sequence, and returns its copy; None if it had ended before."""
        copy = self._copies.pop(number, None)
        if copy is not None:
            self.loads[copy] -= 1
        return copy

    def _choose(self, order: Begin | Score) -> int:
        """Returns the copy that a sequence goes to."""
        beginnings = _beginnings(order)
        copy = self.loads.index(min(self.loads))
        for beginning in reversed(beginnings):
            if beginning in self._homes:
                copy = self._nearer(self._homes[beginning], copy)
                break
        for beginning in beginnings:
            self._homes.pop(beginning, None)
            self._homes[beginning] = copy
        while len(self._homes) > _MOST_BEGINNINGS:
            del self._homes[next(iter(self._homes))]
        return copy

    def _nearer(self, home: int, idlest: int) -> int:
        """Returns the copy that has read a beginning, unless it has too much to do."""
        most = min(self._places, self.loads[idlest] + max(1, self._places // 4))
        return home if self.loads[home] < most else idlest


def _beginnings(order: Begin | Score) -> list[int]:
    """Returns what the beginnings of a sequence are known by, from the shortest on."""
    tokens = order.prompt if isinstance(order, Begin) else order.tokens
    found, length = [], _LEAST_BEGINNING
    while length <= len(tokens):
        found.append(hash((order.adapter, tuple(tokens[:length]))))
        length *= 2
    return found
