"""Prompt lookup: guesses the next tokens from what a text says already (Saxena 2023).

Where the last tokens stood before, what came after them then may come again: quotations, names,
code. A pass reads the guessed tokens together with the last one, and those that would have been
chosen anyway are kept.
"""

from collections.abc import Sequence

# The most tokens that are looked for; with fewer, matches are by chance more often.
_LONGEST = 3


def find_draft(tokens: Sequence[int], count: int) -> list[int]:
    """Returns up to `count` tokens that may come next; none if the last token is a new one.

    The longest of the last tokens' runs that was there before decides, at its last place.

    Args:
        tokens: The token ids of the prompt and of the continuation so far.
        count: The most tokens to guess.
    """
    if count < 1:
        return []
    whole = list(tokens)
    for size in range(min(_LONGEST, len(whole) - 1), 0, -1):
        last = whole[-size:]
        for start in range(len(whole) - size - 1, -1, -1):
            if whole[start : start + size] == last:
                return whole[start + size : start + size + count]
    return []
