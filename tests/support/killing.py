"""Runs conversions in processes of their own, which are cheap to start and can be killed.

A fork server imports torch once; every process after that starts in some milliseconds.
"""

import contextlib
import functools
import hashlib
import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from glm3cli.config.convert import ConvertOptions


@functools.cache
def _context() -> ForkServerContext:
    """Returns a fork server that has imported what a conversion needs."""
    # One that other tests have started hasn't imported torch, and takes no more orders to.
    forkserver._forkserver._stop()
    context = multiprocessing.get_context("forkserver")
    names = ["convert.convert"]
    names += [
        f"layouts.{layout}{kind}" for layout in ("dist", "ranks", "hf") for kind in ("", "_writer")
    ]
    # pytest too: a new process imports the program that the first one runs.
    context.set_forkserver_preload(["pytest", *(f"glm3cli.checkpoint.{n}" for n in names)])
    return context


def start(function, *args, **options) -> BaseProcess:
    """Starts a process that runs `function`, which must be importable by its name."""
    process = _context().Process(target=function, args=args, kwargs=options)
    process.start()
    return process


def wait_forever(*progress: object) -> None:
    """Takes the progress of a conversion, and never returns once some of it is done."""
    while progress[1]:
        time.sleep(60)


def run_conversion(
    source: Path,
    target: Path,
    options: ConvertOptions,
    log: Path,
    limit: int | None = None,
    *,
    stays: bool = False,
) -> None:
    """Converts a model as the command does, with its exit codes.

    Args:
        source: The model to convert.
        target: The new folder.
        options: The options of the conversion.
        log: The file to which stderr is appended; "begins" is its first line.
        limit: The largest size of a file in bytes; None for no limit.
        stays: Whether it waits forever once it has begun to write.
    """
    import resource

    import torch

    from glm3cli.checkpoint.convert.convert import convert
    from glm3cli.checkpoint.convert.report import report_nothing
    from glm3cli.errors import Glm3Error
    from glm3cli.host.signals import stopped_by_sigterm

    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with log.open("a") as stream, contextlib.redirect_stderr(stream):
        try:
            with stopped_by_sigterm("the conversion", "nothing half-written is left; run it again"):
                print("begins", file=stream, flush=True)
                convert(source, target, options, wait_forever if stays else report_nothing)
        except Glm3Error as error:
            print(error.message, error.hint, file=stream, flush=True)
            sys.exit(error.exit_code)


def hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def free_process_number() -> int:
    """Returns the id of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child
