"""`--nproc N`: starts N local ranks of this very command through torch's launcher."""

import os
import sys

from glm3cli.config.launch import LaunchConfig


def is_speaker() -> bool:
    """Whether this process prints the result: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def relaunch(config: LaunchConfig) -> bool:
    """Runs this command on `nproc` ranks and tells whether it did; False means: run it here.

    Exits with the exit code of the first rank that failed.
    """
    if config.nproc is None or "RANK" in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Ranks
    from torch.distributed.launcher.api import elastic_launch

    # Ranks share the cores; torch's launcher would otherwise give each of them one thread or all.
    threads = max(1, len(os.sched_getaffinity(0)) // config.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    ranks = Ranks(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.nproc,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(ranks, sys.executable)("-m", "glm3cli", *sys.argv[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    return True
