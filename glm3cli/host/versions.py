"""Reads the versions of glm3 and of installed packages from metadata, without importing them."""

import functools
from importlib.metadata import PackageNotFoundError, version

from glm3cli.version import __version__


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of glm3 and of `packages` by name; `absent` for what isn't installed."""
    return {"glm3": __version__} | {name: _version_of(name) for name in packages}


@functools.cache
def _version_of(package: str) -> str:
    """Returns a package's version, or `absent`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
