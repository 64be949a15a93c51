"""`PlanOptions`: the options of `--dry-run` and `--auto-layout`, and of the devices they plan for.

The devices of a dry run needn't be in this machine.
"""

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag
from glm3cli.config.launch import LaunchConfig

PANEL = "Planning"

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class PlanOptions(LaunchConfig):
    """The options for planning: does a run fit into its devices, and what would be fastest?"""

    dry_run: Annotated[bool, Flag(panel=PANEL)] = Field(
        default=False, description="Check everything, print the plan, write nothing."
    )
    auto_layout: Annotated[bool, Flag(panel=PANEL)] = Field(
        default=False,
        description="Choose tp, pp, vpp, cp, micro-batch and recomputation: the fastest that fit "
        "into the devices. Those that are given are replaced.",
    )
    device_memory: Annotated[str | None, Flag(panel=PANEL, metavar="SIZE")] = Field(
        default=None,
        pattern=r"^(?i:\d{1,15}(\.\d{1,15})?([KMGT]i?B)?)$",
        description="Memory of a device, such as 64GB (powers of 1000) or 64GiB: what doesn't fit "
        "isn't started, and --dry-run lists the parallel sizes that fit.",
    )
    planned_world_size: Annotated[int | None, Flag(name="world_size", panel=PANEL)] = Field(
        default=None,
        ge=1,
        le=2**20,
        description="Ranks to plan for; default: those that would be started.",
    )
    chip: Annotated[str | None, Flag(panel=PANEL, is_path=True)] = Field(
        default=None,
        description="Device to plan for, for its speed and memory, or a .toml file that describes "
        "one (keys: see glm3cli/device/chips.toml); default: 910B.",
    )

    @model_validator(mode="after")
    def _check_planning(self) -> Self:
        if not self.dry_run and self.planned_world_size is not None:
            raise ValueError(
                "--world-size is for --dry-run; ranks are started with --nproc or torchrun"
            )
        if not (self.dry_run or self.auto_layout) and self.chip is not None:
            raise ValueError("--chip is for --dry-run and --auto-layout; training runs on --device")
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks: that of `--world-size`, else that of `LaunchConfig`."""
        return self.planned_world_size or super().world_size

    @property
    def plans_elsewhere(self) -> bool:
        """Whether a dry run plans for devices other than those that it would start on."""
        named = (self.chip, self.device_memory, self.planned_world_size)
        return self.dry_run and any(value is not None for value in named)

    @property
    def device_bytes(self) -> int | None:
        """The memory of a device in bytes, by `device_memory`; None if that isn't given."""
        if self.device_memory is None:
            return None
        parts = re.fullmatch(r"([\d.]+)([KMGT]?)(I?)B?", self.device_memory.upper())
        assert parts is not None  # the field's pattern
        number, unit, binary = parts.groups()
        return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit])
