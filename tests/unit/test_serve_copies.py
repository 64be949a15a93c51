"""How a server shares sequences out among the copies of its model."""

from collections.abc import Sequence

from glm3cli.infer.serve.copies import Copies
from glm3cli.infer.serve.orders import End, Order, Score, Update


class Sink:
    """A copy that only takes orders."""

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def put(self, orders: Sequence[Order]) -> None:
        self.orders += orders


def copies_of(count: int, places: int) -> tuple[Copies, list[Sink]]:
    sinks = [Sink() for _ in range(count)]
    return Copies([sink.put for sink in sinks], places), sinks


def read(number: int, tokens: Sequence[int], adapter: str | None = None) -> Score:
    return Score(number, tokens, 0, adapter)


def test_the_idlest_copy_gets_what_comes() -> None:
    copies, sinks = copies_of(3, places=8)
    copies.put([read(number, [number]) for number in range(7)])
    assert copies.loads == [3, 2, 2]
    copies.note([Update(1, [], "scored"), Update(4, []), Update(2, [], "scored")])
    assert copies.loads == [3, 1, 1]
    copies.put([End(4), End(4), End(99), read(7, [7])])
    assert copies.loads == [3, 1, 1]
    assert [order.number for order in sinks[1].orders] == [1, 4, 4, 7]
    assert isinstance(sinks[1].orders[2], End)
    copies.note([Update(4, [], "stop")])  # was under way when its end was told
    assert copies.loads == [3, 1, 1]


def test_a_chat_stays_where_its_turns_were_read() -> None:
    copies, _ = copies_of(2, places=8)
    chat = list(range(100))
    copies.put([read(0, [0]), read(1, chat)])
    copies.note([Update(0, [], "scored"), Update(1, [], "scored")])
    copies.put([read(2, [*chat, *range(200)])])
    assert copies.loads == [0, 1]
    copies.put([read(3, [*chat, *range(500)], adapter="other")])  # other keys and values
    assert copies.loads == [1, 1]
    copies.put([read(4, chat[:63])])  # too short to be known
    assert copies.loads == [2, 1]


def test_a_beginning_that_all_have_does_not_fill_one_copy() -> None:
    copies, _ = copies_of(2, places=8)
    copies.put([read(number, [*range(600), number]) for number in range(16)])
    assert copies.loads == [8, 8]
    copies.put([read(number, [*range(600), number]) for number in range(16, 20)])
    assert copies.loads == [10, 10]


def test_what_is_known_of_beginnings_is_bounded() -> None:
    copies, _ = copies_of(2, places=8)
    for number in range(5000):
        copies.put([read(number, [number] * 64), End(number)])
    assert len(copies._homes) == 4096
