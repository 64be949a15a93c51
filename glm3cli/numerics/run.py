"""`run_numerics`: all checks on this rank, and the outcomes of all ranks together."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist

from glm3cli.config.doctor import DoctorConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import Device, require_active
from glm3cli.host.files import write_text
from glm3cli.numerics.chip_file import chip_file
from glm3cli.numerics.collectives import check_collectives
from glm3cli.numerics.decoding_cases import decoding_cases
from glm3cli.numerics.outcome import Outcome, survived, worst
from glm3cli.numerics.small_model import check_small_model, sizes_for
from glm3cli.numerics.speed import Speeds, measure
from glm3cli.numerics.training_cases import training_cases
from glm3cli.numerics.traps import check_traps
from glm3cli.parallel.groups import open_grid

# Positions of a long sequence: more than the compressed mask of an operator has.
_LONG, _LONG_ON_THE_HOST = 8192, 2112
# Shows a line to the user.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What all checks have found on all ranks.

    Attributes:
        device: The kind of device.
        chip: The name that its driver has for it.
        num_ranks: The number of ranks.
        outcomes: The worst outcome of each check in each type.
        speeds: What was measured for --chip-file, which is written; None without.
    """

    device: str
    chip: str
    num_ranks: int
    outcomes: list[Outcome] = field(default_factory=list)
    speeds: Speeds | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the report for JSON."""
        return {
            "device": self.device,
            "chip": self.chip,
            "ranks": self.num_ranks,
            "ok": not self.failures,
            "checks": [outcome.to_dict() for outcome in self.outcomes],
            "speeds": self.speeds and self.speeds.to_dict(),
        }

    @property
    def failures(self) -> list[Outcome]:
        """The checks that have failed."""
        return [outcome for outcome in self.outcomes if not outcome.ok]


def run_numerics(config: DoctorConfig, say: Say) -> Report:
    """Runs all checks; every rank must call it, with an active device.

    Args:
        config: The settings.
        say: Shows a line about what is checked now; called on every rank.

    Returns:
        The report of all ranks on rank 0, and of this one alone on the others.
    """
    device, count = require_active(), config.world_size
    found: list[Outcome] = []
    with open_grid(ParallelConfig()) as grid:
        rank = grid.rank
        say("operators")
        found += _operators(device)
        if count > 1:
            say("collectives")
            found += check_collectives(device)
        folder = Path(_tell_all("folder", tempfile.mkdtemp(prefix="glm3-") if rank == 0 else ""))
    for sizes in sizes_for(count):
        say(f"training, a checkpoint, and generation with {sizes}")
        found += survived(f"small model, {sizes}", check_small_model(sizes, count, folder))
    speeds = None
    with open_grid(ParallelConfig()) as grid:
        own = [asdict(replace(one, rank=rank)) for one in worst(found)]
        everyone = [Outcome(**one) for part in _gather("outcomes", own) for one in part]
        if config.chip_file is not None:
            say("speeds")
            speeds = Speeds.slowest(_gather("speeds", measure(device, grid).to_dict()))
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        if speeds is not None and config.chip_file is not None:
            write_text(config.chip_file, chip_file(config.chip_file, device, count, speeds))
    return Report(device.name, device.chip(), count, worst(everyone), speeds)


def _operators(device: Device) -> Iterator[Outcome]:
    """Yields the outcomes of all operators on this rank."""
    on_host = device.torch_device().type == "cpu"
    long = _LONG_ON_THE_HOST if on_host else _LONG
    for case in chain(training_cases(long), decoding_cases()):
        yield from case.outcomes(device)
    yield from check_traps(device)


# The ranks tell each other by the store of their start, not by the collectives that are examined.


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _tell_all(key: str, value: str) -> str:
    """Returns the value that rank 0 has."""
    if dist.get_rank() == 0:
        _store().set(key, value)
    return str(_store().get(key).decode())


def _gather(key: str, value: Any) -> list[Any]:
    """Returns the values of all ranks on rank 0, and this rank's own on the others.

    Args:
        key: The name of the value.
        value: What JSON knows.
    """
    _store().set(f"{key}/{dist.get_rank()}", json.dumps(value))
    if dist.get_rank() != 0:
        return [value]
    return [json.loads(_store().get(f"{key}/{rank}")) for rank in range(dist.get_world_size())]
