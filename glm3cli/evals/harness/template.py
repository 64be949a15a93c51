"""Conversations as texts, in which lm-evaluation-harness carries them.

The harness knows texts alone. A turn is written as a mark with the name of its role, and its
content; `token_ids` makes of them what the model's chat format does.
"""

import re
from collections.abc import Mapping, Sequence

from glm3cli.data.tokens.chat import begin_turn
from glm3cli.data.tokens.messages import ROLES, Message
from glm3cli.data.tokens.tokenizer import Tokenizer

# A role's name between two characters that no text for people has.
_MARK = "\x02<|{role}|>\x03"
_MARKS = re.compile(rf"\x02<\|({'|'.join(ROLES)})\|>\x03")


def as_text(turns: Sequence[Mapping[str, str]], *, begins_answer: bool) -> str:
    """Returns a conversation as a text.

    Args:
        turns: The turns, each with `role` and `content`.
        begins_answer: Whether the assistant speaks next; if not, the last turn is to be continued.
    """
    text = "".join(_MARK.format(role=turn["role"]) + turn["content"] for turn in turns)
    return text + _MARK.format(role="assistant") if begins_answer else text


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of a text, without the prefix; of turns, as they are trained."""
    before, *pieces = _MARKS.split(text)
    if not pieces:
        return tokenizer.encode(text)
    ids = tokenizer.encode(before) if before else []
    turns = [
        Message.from_dict({"role": role, "content": content})
        for role, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return [*ids, *begin_turn(tokenizer, turns)[len(tokenizer.prefix) :]]
