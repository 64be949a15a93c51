"""Reads numbers from the environment, which users and launchers set."""

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
            "unset it or mend it; torchrun and --nproc set those of ranks",
        )
    return int(text or default)
