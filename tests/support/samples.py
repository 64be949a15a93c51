"""Small files of tokens, written as `glm3 preprocess` writes them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm3cli.data.indexed import IndexedWriter
from glm3cli.data.kinds import instruction_file


def write_documents(prefix: Path | str, documents: Sequence[Sequence[int]]) -> str:
    """Writes a pair of token files with one sequence for each document; returns the prefix."""
    writer = IndexedWriter(Path(prefix))
    for document in documents:
        tokens = np.array(document, dtype=np.int32)
        writer.add(tokens, np.array([len(document)], dtype=np.int32), np.array([1]))
    writer.finish()
    for path in (writer.bin_path.with_suffix(ending) for ending in (".lengths", ".documents")):
        path.unlink()
    return str(prefix)


def write_instructions(
    prefix: Path | str, documents: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> str:
    """Writes the three file pairs of (prompt, answer) documents whose prompts aren't trained."""
    tokens = [[*prompt, *answer] for prompt, answer in documents]
    labels = [[*[-100] * len(prompt), *answer] for prompt, answer in documents]
    write_documents(instruction_file(str(prefix), "input_ids"), tokens)
    write_documents(instruction_file(str(prefix), "labels"), labels)
    write_documents(
        instruction_file(str(prefix), "attention_mask"), [[1] * len(line) for line in tokens]
    )
    return str(prefix)
