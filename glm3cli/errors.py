"""The errors that a user can cause or mend, each with the exit code of the program.

`cli.app.main` catches them and prints message and hint as two sentences. Any other exception that
reaches it is a bug of ours, and ends the program with its traceback (exit code 1).
"""

from typing import Any


class Glm3Error(Exception):
    """The base of all errors that are reported to a user.

    Attributes:
        exit_code: The program's exit code after such an error.
        message: What is wrong: the value and the rule that it breaks.
        hint: What the user can do about it; may be empty.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["Glm3Error"], tuple[Any, ...]]:
        """Pickles message and hint, so that the error reaches another process unchanged."""
        return type(self), (self.message, self.hint)


class ConfigError(Glm3Error):
    """A command, option or configuration file is wrong."""

    exit_code = 2


class CheckpointError(Glm3Error):
    """A model folder is missing, damaged, or holds another kind of model."""

    exit_code = 3


class DataError(Glm3Error):
    """Data for training, prompts or benchmarks is missing or wrong."""

    exit_code = 3


class DeviceError(Glm3Error):
    """An accelerator, a driver, or the start of the ranks doesn't work."""

    exit_code = 4


class StoppedError(Glm3Error):
    """The run was asked to stop (SIGTERM) and has saved its state."""

    exit_code = 143
