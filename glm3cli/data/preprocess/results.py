"""Puts the results of tools into the order of the calls that they answer."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, groupby
from typing import NamedTuple

from glm3cli.data.preprocess.fields import Row, RowError, json_of, shown
from glm3cli.data.tokens.messages import Message

_ID = "tool_call_id"


class Turn(NamedTuple):
    """A turn of a conversation as it is given, and as it is read.

    Attributes:
        place: Which field of the row it is, such as `messages[2]`.
        given: The turn as it is in the row.
        messages: What it says: a text, calls of tools, or both.
    """

    place: str
    given: Row
    messages: list[Message]

    @property
    def is_result(self) -> bool:
        """Whether the turn is the result of a call that it names by its id."""
        roles = {message.role for message in self.messages}
        return roles == {"observation"} and self.given.get(_ID) not in (None, "")


def in_order_of_calls(turns: Sequence[Turn]) -> list[Turn]:
    """Returns turns in which results that follow each other are in the order of their calls.

    A result in the prompt has no id, so that its place alone says which call it answers. Where no
    call before a result has an id, the result stays where it is.

    Raises:
        RowError: A result has an id that no call before it has.
    """
    if not any(turn.is_result for turn in turns):
        return list(turns)
    numbers, order = count(), dict[str, int]()
    ordered: list[Turn] = []
    for are_results, together in groupby(turns, lambda turn: turn.is_result):
        group = list(together)
        if not are_results:
            order |= {name: next(numbers) for turn in group for name in _call_ids(turn)}
        elif order:
            for turn in group:
                if str(turn.given[_ID]) not in order:
                    expected = f"expected the id of a call before it, {', '.join(order)}"
                    got = shown(turn.given[_ID])
                    raise RowError(f"{turn.place}.{_ID}", f"{expected}; got {got}")
            group.sort(key=lambda turn: order[str(turn.given[_ID])])
        ordered += group
    return ordered


def _call_ids(turn: Turn) -> Iterator[str]:
    """Yields the ids of a turn's calls, of those that have one."""
    calls = json_of(turn.given, "tool_calls", turn.place)
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, Mapping) and call.get("id") not in (None, ""):
            yield str(call["id"])
