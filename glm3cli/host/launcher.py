"""What the environment says of the ranks that a launcher has started, torchrun or a cluster."""

import os

from glm3cli.host.environment import number_of


def is_local_rank() -> bool:
    """Whether this process is one of the ranks that torchrun, or --nproc, starts on a machine."""
    return bool({"LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys())


def launched_ranks() -> int | None:
    """Returns the number of ranks, where this process was started as one of them; else None.

    Clusters that start one process on each machine, as Kubeflow's PyTorchJob does, set WORLD_SIZE
    for a single machine, too: that process is free to start ranks.

    Raises:
        ConfigError: WORLD_SIZE is no whole number.
    """
    world_size = number_of("WORLD_SIZE", 0)
    return world_size if world_size > 1 or (world_size and is_local_rank()) else None
