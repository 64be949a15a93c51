"""Computes PREFIX.stats.json: what a run of preprocess wrote, and from what."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from glm3cli.data.kinds import WEIGHTS_KEY
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.job import Job

_FORMAT = 1


def statistics(
    job: Job,
    counts: Counts,
    samples: Mapping[str, Path],
    names: Mapping[str, str],
    folder: Path,
    pack_length: int | None,
) -> dict[str, Any]:
    """Returns the statistics of finished files, as JSON values.

    Args:
        job: The inputs, tokenizer and settings of the run.
        counts: What the run counted.
        samples: The .bin file of every output key before packing, which has one sequence for each
            sample or text, with its .lengths file beside it.
        names: The names of the finished files without their endings, by output key.
        folder: The folder that holds the finished files now.
        pack_length: The length of a pack in tokens; None if nothing was packed.
    """
    lengths = {
        key: np.fromfile(path.with_suffix(".lengths"), np.int32)
        for key, path in samples.items()
        if key != WEIGHTS_KEY
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
            f"{name}.{ending}": (folder / f"{name}.{ending}").stat().st_size
            for ending in ("bin", "idx")
            for name in names.values()
        },
        "job": asdict(job),
    }
    if pack_length:
        packs = np.fromfile(folder / f"{names['input_ids']}.lengths", np.int32)
        found["packs"] = len(packs)
        found["fill_rate"] = float(packs.sum(dtype=np.int64) / (len(packs) * pack_length))
    return found


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """Counts how many lengths lie between neighbouring powers of two.

    Returns:
        Counts by range: {"0": n, "1-1": n, "2-3": n, "4-7": n, ...}, without empty ranges.
    """
    exponents = np.frexp(lengths[lengths > 0])[1]  # n lies in [2^(e-1), 2^e)
    counts = np.bincount(exponents) if len(exponents) else np.zeros(0, dtype=np.int64)
    found = {f"{2 ** (e - 1)}-{2**e - 1}": int(n) for e, n in enumerate(counts) if e and n}
    return ({"0": int((lengths == 0).sum())} if (lengths == 0).any() else {}) | found
