r"""Starts the ranks of a command (`--nproc N`), or prepares this process to run it.

A rank's error reaches its launcher through the file that torch's launcher names to each rank, so
that the user reads the first one, once, whichever rank it was.

On several machines torchrun starts the ranks, with the same command on each (README, "Many
machines"). Where the machines have fixed numbers, a file of host names and ssh do as well; train.sh
is on every machine and has the two lines

    source .venv/bin/activate
    torchrun --nnodes "$NODES" --node_rank "$NODE" --master_addr "$FIRST" --master_port 29500 \
        --nproc_per_node 8 -m glm3cli pretrain --config run.yaml

and is started by

    node=0
    for host in $(cat hosts); do
        variables="NODES=$(wc -l < hosts) NODE=$node FIRST=$(head -n 1 hosts)"
        ssh -n "$host" "cd $PWD; $variables bash train.sh" > "$host.log" 2>&1 &
        node=$((node + 1))
    done; wait

With Slurm, which here warns ten minutes before the time is up, so that the run saves:

    #!/bin/bash
    #SBATCH --nodes 4 --ntasks-per-node 1 --time 24:00:00 --signal TERM@600
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=500
    srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv-id "$SLURM_JOB_ID" \
        --rdzv-backend c10d --rdzv-endpoint "$(scontrol show hostnames | head -n 1):29500" \
        --max-restarts 2 -m glm3cli pretrain --config run.yaml

- A plain torchrun kills its ranks 30 s after a SIGTERM. Export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800
  so that a large model has the time to save; `--nproc` does that by itself.
- torchrun imports torch, which by itself imports a vendor's extension of it: where a part of that
  is missing, it fails before glm3 can say which. Export TORCH_DEVICE_BACKEND_AUTOLOAD=0 before
  torchrun; `--nproc` does that by itself.
- `--max-restarts 2` (of torchrun, or beside `--nproc`) starts all ranks again when one dies, and
  the run goes on from its last checkpoint. Give `--save-interval` and leave `--resume` at auto:
  with never or a checkpoint, all starts begin alike. Restarts on several machines need
  `--rdzv-backend c10d`.
- A rank that waits for others longer than ten minutes names those that are missing;
  GLM3_START_TIMEOUT is the number of seconds.
- No disk need be shared. Every machine reads its own copies of the model and the data, builds
  sample indices in memory, and preprocesses raw data by itself. Before they train, the ranks
  compare a hash of their files and name those that differ.
- `--save` may be a folder on a shared disk or one on each machine; the ranks find out which by a
  file. On disks of their own, each machine keeps what its ranks wrote of a checkpoint, and the
  first one metrics.jsonl and report.html. Before a run goes on, each machine gets the files that
  it lacks from the others, which takes the time and the room of a whole checkpoint on each of
  them. A machine that is replaced loses what it alone had: the run names the files that nobody
  has, and goes on from an older checkpoint.
- To use such a checkpoint elsewhere (convert, generate, eval), copy the files of its folder on all
  machines into one folder; what is missing is named with the machine that has it.
"""

import json
import logging
import os
import signal
import sys
import time
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from glm3cli.config.launch import LaunchConfig
from glm3cli.errors import Glm3Error
from glm3cli.host.imports import large_imports
from glm3cli.host.launcher import launched_ranks
from glm3cli.host.limits import allow_open_files
from glm3cli.parallel.interrupts import Signals, signals_passed_on

_log = logging.getLogger(__name__)
# Files that a rank opens, measured with gloo: one alone and each further one; and the usual limit,
# which holds for ranks on many machines, too.
_FILES, _FILES_OF_A_RANK, _FILES_AT_MOST = 96, 16, 1024
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torch's launcher for each rank
_OURS = "GLM3_LAUNCHED"  # set by us: the launcher shows what the ranks hand over


class RankError(Glm3Error):
    """The error of a rank that this process started."""

    def __init__(self, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def is_speaker() -> bool:
    """Whether this process prints the result: rank 0, or the only one."""
    return (os.environ.get("RANK") or "0") == "0"


def is_alone() -> bool:
    """Whether no launcher waits for this process's errors."""
    return _ERROR_FILE not in os.environ


def run_here(config: LaunchConfig, *, answers: Signals = ()) -> bool:
    """Prepares the device and tells that the command runs in this process.

    With --nproc, runs the command on so many local ranks instead and gives False when they are
    done. Import nothing of the model before: the device must come first.

    Args:
        config: The options for the device and for the ranks.
        answers: The signals that go to the ranks that this process starts, instead of ending
            them, as they end other commands; the ranks must call `interrupts.accept`.

    Raises:
        DeviceError: The device can't be used, or this process may open too few files at once.
    """
    allow_open_files(min(_FILES + _FILES_OF_A_RANK * config.world_size, _FILES_AT_MOST))
    if config.nproc is not None and launched_ranks() is None:
        with signals_passed_on(answers) if answers else nullcontext():
            _launch(config.nproc, config.max_restarts)
        return False
    with large_imports():
        from glm3cli.device import select

        select(config.device).activate(config.without_kernel)
    if config.without_kernel and is_speaker():
        _log.warning("left out by --without-kernel: %s", ", ".join(config.without_kernel))
    return True


def hand_over(error: Glm3Error) -> bool:
    """Leaves a rank's error to its launcher; tells whether that one shows it."""
    file = os.environ.get(_ERROR_FILE)
    if file is None:
        return False
    # The form that torch's launcher reads (torch/distributed/elastic/multiprocessing/errors).
    told = {"py_callstack": error.message, "timestamp": str(int(time.time()))}
    message = {
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "extraInfo": told,
    }
    Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
    return _OURS in os.environ


def _launch(nproc: int, max_restarts: int) -> None:
    """Runs this very command on `nproc` ranks; ends as the first that failed.

    Raises:
        RankError: A rank ended with a user's error, or a signal came.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Ranks
    from torch.distributed.launcher.api import elastic_launch

    # Ranks share the cores; torch's launcher would otherwise give each of them one thread or all.
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Ranks that were asked to stop save first, which may take minutes; torch's default is 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1800")
    os.environ[_OURS] = "1"
    # What torch's launcher logs of failed ranks would stand above the sentence about them.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    ranks = Ranks(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(ranks, sys.executable)("-m", "glm3cli", *sys.argv[1:])
    except SignalException as error:  # passed on to the ranks, which have ended
        raise RankError(
            f"stopped by {error.sigval.name}", "run the same command again", 128 + error.sigval
        ) from None
    except ChildFailedError as error:
        _end_as(list(error.failures.values()))


def _end_as(failures: list[Any]) -> None:
    # A rank that only lost its peer hands nothing over: the one that did is the cause.
    failure = min(failures, key=lambda one: (_told(one) is None, one.timestamp))
    told = _told(failure)
    if told is None:
        raise _untold(failure)
    # Not the exit code of its process, which may have been stopped on its way out.
    raise RankError(told["message"], told["hint"], told["exit_code"])


def _untold(failure: Any) -> RankError:
    """Returns the error of a rank that has said nothing before it ended, or only its traceback."""
    number, rank = failure.exitcode, failure.local_rank
    if number > 0:
        return RankError(f"rank {rank} ended with {number}", "see what it wrote above", number)
    name = signal.Signals(-number).name
    way = "look for a full memory in the machine's log (dmesg)" if name == "SIGKILL" else ""
    return RankError(f"rank {rank} was ended by {name}", way, 128 - number)


def _told(failure: Any) -> dict[str, Any] | None:
    message = failure.error_file_data["message"]
    return message if isinstance(message, dict) and "hint" in message else None
