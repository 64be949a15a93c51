"""Compares the fast encoder with sentencepiece on many random texts.

python tests/benchmarks/fuzz_encoder.py --tokenizer DIR --texts 1000000
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from glm3cli.data.tokens.tokenizer import Tokenizer
from tests.support.awkward_texts import awkward_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder")
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    plain, fast = Tokenizer.load(options.tokenizer), Tokenizer.load(options.tokenizer)
    fast.use_fast_encoder()
    assert fast.vocabulary._fast is not None, "there is no fast encoder for this tokenizer"
    pieces = [
        plain.vocabulary.pieces.id_to_piece(i)
        for i in range(plain.vocabulary.pieces.get_piece_size())
    ]
    start, count, size, left = time.monotonic(), 0, 0, 0
    differing = []
    for text in awkward_texts(pieces, options.texts, options.seed):
        count, size = count + 1, size + len(text)
        left += fast.vocabulary._fast.encode(text) is None
        if fast.encode(text) != plain.encode(text):
            differing.append(text)
    print(
        f"{count:,} texts of {size / 1e6:.1f} million characters in "
        f"{time.monotonic() - start:.0f} s: {len(differing)} differ; {left:,} were left to "
        "sentencepiece"
    )
    for text in sorted(differing, key=len)[:5]:
        print(repr(text[:200]))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
