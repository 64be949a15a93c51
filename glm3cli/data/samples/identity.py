"""Checks that all ranks read the same data, each from its own machine's disk.

Without this check nobody would notice: if the files of ranks differ, some samples are trained twice
and others never, while the losses look normal.
"""

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
import xxhash

from glm3cli.data.kinds import DataKind
from glm3cli.data.prefixes import Blend
from glm3cli.errors import DataError
from glm3cli.parallel.join import ranges

_SAMPLE = 2**20  # bytes of a .bin file that are compared, at its start and at its end


def check_same_data(blend: Blend, kind: DataKind) -> None:
    """Compares the files of all ranks; every rank has to call it.

    Args:
        blend: The data sets of this rank.
        kind: The kind of data.

    Raises:
        DataError: The files differ; says on which ranks.
    """
    ours = (socket.gethostname(), [fingerprint(prefix, kind) for prefix in blend.prefixes])
    ranks: list[tuple[str, list[str]]] = [ours] * dist.get_world_size()
    dist.all_gather_object(ranks, ours)
    if any(len(prints) != len(ranks[0][1]) for _, prints in ranks):
        raise DataError(
            "the ranks were not given the same number of --data: "
            + "; ".join(_groups([f"{len(prints)} on {host}" for host, prints in ranks])),
            "start the same command on every machine",
        )
    for index, prefix in enumerate(blend.prefixes):
        if len({prints[index] for _, prints in ranks}) > 1:
            found = _groups([f"{prints[index]} on {host}" for host, prints in ranks])
            raise DataError(
                f"--data {prefix} is not the same on all ranks: {'; '.join(found)}",
                "copy the files of one machine to the others",
            )


def fingerprint(prefix: str, kind: DataKind) -> str:
    """Returns the size of a data set and a hash of its content, as text for a message.

    The hash covers the whole indices, and the start, the end and the size of the tokens. It doesn't
    depend on where the files are.
    """
    total, digest = 0, xxhash.xxh3_64()
    for name in kind.file_names(prefix):
        for block in _compared_blocks(Path(f"{name}.idx"), Path(f"{name}.bin")):
            digest.update(block)
        total += Path(f"{name}.bin").stat().st_size
        digest.update(total.to_bytes(8, "little"))
    return f"{total:,} bytes ({digest.hexdigest()})"


def _compared_blocks(index: Path, tokens: Path) -> Iterator[bytes]:
    """Yields the content of a whole .idx file, then the start and the end of a .bin file."""
    with index.open("rb") as file:
        while block := file.read(_SAMPLE):
            yield block
    with tokens.open("rb") as file:
        yield file.read(_SAMPLE)
        file.seek(max(0, tokens.stat().st_size - _SAMPLE))
        yield file.read(_SAMPLE)


def _groups(values: Sequence[str]) -> Iterator[str]:
    """Yields for each value a phrase that says which ranks have it; values are in rank order."""
    for value in dict.fromkeys(values):
        ranks = ranges(rank for rank, other in enumerate(values) if other == value)
        yield f"ranks {ranks} have {value}"
