"""The errors that a user can cause, each with its exit code.

Only `cli.app.main` catches them. Anything else that escapes is a bug of ours and keeps its
traceback (exit code 1).
"""


class Glm3Error(Exception):
    """A user's error: `message` has the value and the rule, `hint` the way out."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["Glm3Error"], tuple[str, str]]:
        """So that it also reaches another process whole."""
        return type(self), (self.message, self.hint)


class ConfigError(Glm3Error):
    """Wrong usage, option or configuration file."""

    exit_code = 2


class CheckpointError(Glm3Error):
    """A model folder that is missing, damaged, or of another kind."""

    exit_code = 3


class DataError(Glm3Error):
    """Training, prompt or benchmark data that is missing or wrong."""

    exit_code = 3


class DeviceError(Glm3Error):
    """An accelerator, driver, or launch that doesn't work."""

    exit_code = 4


class StoppedError(Glm3Error):
    """The run was asked to stop (SIGTERM) and has saved its state."""

    exit_code = 143
