"""Compares the ids of GLM-4's tokenizer with tiktoken's, and with those of its export, by fuzz.

    python -m tests.benchmarks.fuzz_ranks --tokenizer DIR --texts 1000000 --every 10

DIR has a tokenizer.model of tiktoken's kind. The reference is built as GLM-4's own
tokenization_chatglm.py builds it. Some of the texts (one in --every) also go through the
tokenizer.json of the layout `glm`, in transformers' backend.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import tiktoken
import tokenizers

from glm3cli.config.family.members import GLM4
from glm3cli.data.tokens.fast.tokenizer import to_fast
from glm3cli.data.tokens.tokenizer import Tokenizer
from tests.support.awkward_texts import awkward_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    ours = Tokenizer.load(options.tokenizer)
    plain = tiktoken.Encoding(
        "glm4",
        pat_str=GLM4.pattern,
        mergeable_ranks=ours.vocabulary.ranks,
        special_tokens=ours.special_tokens,
    )
    content = to_fast(ours) | {"added_tokens": [], "post_processor": None}
    export = tokenizers.Tokenizer.from_str(json.dumps(content))
    pieces = [text for i in range(ours.vocabulary.size) if (text := ours.decode([i])).isprintable()]
    start, differing, exported = time.monotonic(), 0, [0, 0]
    for number, text in enumerate(awkward_texts(pieces, options.texts, options.seed)):
        ids = ours.encode(text)
        differing += ids != plain.encode(text, disallowed_special=())
        if number % options.every == 0:
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            exported[0] += 1
            if export.encode(whole).ids != ids:
                exported[1] += 1
                if exported[1] <= 5:
                    print("the export differs:", repr(shortest(export, ours, whole)))
    seconds = time.monotonic() - start
    print(f"{options.texts:,} texts in {seconds:.0f} s: {differing} differ from tiktoken")
    print(f"{exported[0]:,} of them in the export: {exported[1]} differ")


def shortest(export: tokenizers.Tokenizer, ours: Tokenizer, text: str) -> str:
    """Returns the shortest part of a text, in characters around each place, that differs."""
    for size in itertools.count(1):
        for start in range(max(1, len(text) - size + 1)):
            part = text[start : start + size]
            if export.encode(part).ids != ours.encode(part):
                return part
    return text


if __name__ == "__main__":
    main()
