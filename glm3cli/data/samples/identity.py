"""Checks that all ranks read the same data, each from its own machine's disk.

Without this check nobody would notice: if the files of ranks differ, some samples are trained twice
and others never, while the losses look normal.
"""

import socket
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from glm3cli.data.kinds import DataKind
from glm3cli.data.prefixes import Blend, data_fingerprint
from glm3cli.errors import DataError
from glm3cli.parallel.join import ranges


def check_same_data(blend: Blend, kind: DataKind) -> None:
    """Compares the files of all ranks; every rank has to call it.

    Args:
        blend: The data sets of this rank.
        kind: The kind of data.

    Raises:
        DataError: The files differ; says on which ranks.
    """
    ours = (socket.gethostname(), [data_fingerprint(prefix, kind) for prefix in blend.prefixes])
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


def _groups(values: Sequence[str]) -> Iterator[str]:
    """Yields for each value a phrase that says which ranks have it; values are in rank order."""
    for value in dict.fromkeys(values):
        ranks = ranges(rank for rank, other in enumerate(values) if other == value)
        yield f"ranks {ranks} have {value}"
