"""PREFIX.stats.json: what a run made, and of what."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.job import Job

_FORMAT = 1


def statistics(
    job: Job,
    counts: Counts,
    samples: Mapping[str, Path],
    names: Mapping[str, str],
    folder: Path,
    room: int | None,
) -> dict[str, Any]:
    """All that is told of finished files.

    Args:
        job: What the run was told.
        counts: What it counted.
        samples: The .bin of every key, a sequence per sample or text.
        names: The finished files' names by key.
        folder: Where they are now.
        room: Tokens of a pack; None if nothing was packed.
    """
    lengths = {
        key: np.fromfile(path.with_suffix(".lengths"), np.int32) for key, path in samples.items()
    }
    first = next(iter(lengths.values()))
    found: dict[str, Any] = {
        "format": _FORMAT,
        **asdict(counts),
        "sequences": len(first),
        "tokens_per_byte": counts.tokens / counts.bytes if counts.bytes else None,
        "length_histogram": {key: histogram(values) for key, values in lengths.items()},
        "longest": {key: int(values.max(initial=0)) for key, values in lengths.items()},
        "packs": None,
        "fill_rate": None,
        "files": {
            f"{name}.{kind}": (folder / f"{name}.{kind}").stat().st_size
            for kind in ("bin", "idx")
            for name in names.values()
        },
        "job": asdict(job),
    }
    if room:
        packs = np.fromfile(folder / f"{names['input_ids']}.lengths", np.int32)
        found["packs"] = len(packs)
        found["fill_rate"] = float(packs.sum(dtype=np.int64) / (len(packs) * room))
    return found


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """How many lengths lie between neighbouring powers of two: {"1-1": , "2-3": , "4-7": ...}."""
    exponents = np.frexp(lengths[lengths > 0])[1]  # n lies in [2^(e-1), 2^e)
    counts = np.bincount(exponents) if len(exponents) else np.zeros(0, dtype=np.int64)
    found = {f"{2 ** (e - 1)}-{2**e - 1}": int(n) for e, n in enumerate(counts) if e and n}
    return ({"0": int((lengths == 0).sum())} if (lengths == 0).any() else {}) | found
