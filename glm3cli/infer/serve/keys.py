"""The API keys of a server."""

from pathlib import Path

from glm3cli.errors import DataError


def read_keys(path: Path) -> list[bytes]:
    """Returns the keys in a file, one a line; empty lines and those that begin with # are none.

    Raises:
        DataError: The file can't be read, or has no key.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--api-key-file {path}: {error}", "give a file of keys") from None
    keys = [line.encode() for line in lines if line and not line.startswith("#")]
    if not keys:
        raise DataError(f"--api-key-file {path} has no key", "write one a line")
    return keys
