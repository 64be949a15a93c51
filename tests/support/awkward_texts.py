"""Random texts that are likely to show differences between two tokenizers.

They hold many scripts, white space, control characters, text that looks like pieces or special
tokens, and halves of surrogate pairs.
"""

import random
from collections.abc import Iterator, Sequence

SPACE = "\u2581"
_INVISIBLE = (
    "\t \n \r \r\n \0 \x01 \x1f \x7f \x85 \u2581 \u3000 \u00a0 \u200b \u200d \u2028 \ufeff \ufffd "
    "\u0301 \ud800 \udfff \ue000 \U0010ffff"
)
_VISIBLE = (
    "é e\u0301 0 12 3.14 a b the 你好 世界 日本 カ 한 ש \u0627 ก Ω я 😀 🇩🇪 \U00020000 İ ß ﬁ ① "
    "👩\u200d👩\u200d👧 <s> </s> <unk> <0x0A> [gMASK] <|user|> sop < s> </ http:// ' '' \" ... —— "
    "\uff0c 。 _ __ == \\n { }"
)
PARTS = [" ", "  ", " the", *_INVISIBLE.split(" "), *_VISIBLE.split(" ")]
_RANGES = [(0x20, 0x7F), (0, 0x300), (0x370, 0x2000), (0x2000, 0x3400), (0x4E00, 0x9FFF)]
_RANGES += [(0xAC00, 0xD7A4), (0xE000, 0x10000), (0x10000, 0x110000)]
_COUNTS = [0, 1, 2, 3, 5, 8, 13, 40, 200]


def awkward_texts(pieces: Sequence[str], count: int, seed: int) -> Iterator[str]:
    """Yields random texts, some made of the pieces of a vocabulary, and a few very long ones."""
    choose = random.Random(seed)
    for i in range(count):
        number = choose.choice(_COUNTS)
        kind = choose.random()
        if kind < 0.4:
            yield "".join(choose.choice(PARTS) for _ in range(number))
        elif kind < 0.6:
            ranges = choose.choices(_RANGES, k=number)
            yield "".join(chr(choose.randrange(*limits)) for limits in ranges)
        elif kind < 0.9:
            yield "".join(
                choose.choice(pieces).replace(SPACE, choose.choice([" ", SPACE, ""]))
                for _ in range(number)
            )
        else:
            yield choose.choice(PARTS) * number
        if i % 20_000 == 0:
            yield choose.choice(PARTS) * 50_000
            yield "".join(choose.choice(pieces) for _ in range(20_000))
