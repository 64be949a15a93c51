"""Where a command runs: on ranks that it starts itself (`--nproc N`), or in this process."""

import os
import sys

from glm3cli.config.launch import LaunchConfig


def is_speaker() -> bool:
    """Whether this process prints the result: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run_here(config: LaunchConfig) -> bool:
    """Prepares the device and tells that the command runs in this process.

    With --nproc, runs the command on so many local ranks instead and gives False when they are
    done. Import nothing of the model before: the device must come first.

    Raises:
        DeviceError: The device can't be used.
    """
    if config.nproc is not None and "RANK" not in os.environ:
        _launch(config.nproc)
        return False
    from glm3cli.device import select

    select(config.device).activate()
    return True


def _launch(nproc: int) -> None:
    """Runs this very command on `nproc` ranks; exits with the code of the first that failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Ranks
    from torch.distributed.launcher.api import elastic_launch

    # Ranks share the cores; torch's launcher would otherwise give each of them one thread or all.
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    ranks = Ranks(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(ranks, sys.executable)("-m", "glm3cli", *sys.argv[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
