"""What the environment says of the ranks that a launcher has started, torchrun or a cluster."""

import os
from collections.abc import Mapping

from glm3cli.errors import ConfigError


def number_of(variable: str, default: int, environment: Mapping[str, str] | None = None) -> int:
    """Returns the whole number in an environment variable; an empty one counts as unset.

    Args:
        variable: Its name.
        default: The number where it isn't set.
        environment: The variables; None for those of this process.

    Raises:
        ConfigError: It holds something else.
    """
    text = (os.environ if environment is None else environment).get(variable, "").strip()
    if text and not text.isdecimal():
        raise ConfigError(
            f"{variable}={text} in the environment is no whole number",
            "unset it or mend it; torchrun and --nproc set what ranks need",
        )
    return int(text or default)


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
