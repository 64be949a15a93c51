"""Checks that all ranks read the same data, each from its own machine's disk.

Nothing else would tell: ranks whose files differ train on samples that are counted twice, or not at
all, with losses that look as they should.
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

_SAMPLE = 2**20  # bytes of a .bin that are looked at, at its start and at its end


def check_same_data(blend: Blend, kind: DataKind) -> None:
    """Compares the files of every rank; all ranks call it.

    Raises:
        DataError: They differ; says where.
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
    """The bytes of the files of a prefix, and a hash of what is in them; nothing of their place."""
    total, digest = 0, xxhash.xxh3_64()
    for name in kind.file_names(prefix):
        for part in _parts(Path(f"{name}.idx"), Path(f"{name}.bin")):
            digest.update(part)
        total += Path(f"{name}.bin").stat().st_size
        digest.update(total.to_bytes(8, "little"))
    return f"{total:,} bytes ({digest.hexdigest()})"


def _parts(index: Path, tokens: Path) -> Iterator[bytes]:
    """The whole index, and both ends of the tokens."""
    with index.open("rb") as file:
        while part := file.read(_SAMPLE):
            yield part
    with tokens.open("rb") as file:
        yield file.read(_SAMPLE)
        file.seek(max(0, tokens.stat().st_size - _SAMPLE))
        yield file.read(_SAMPLE)


def _groups(values: Sequence[str]) -> Iterator[str]:
    """Says which ranks have which value."""
    for value in dict.fromkeys(values):
        ranks = ranges(rank for rank, other in enumerate(values) if other == value)
        yield f"ranks {ranks} have {value}"
