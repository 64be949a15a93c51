"""Versions of glm3 and of installed packages, read from their metadata without importing them."""

import functools
from importlib.metadata import PackageNotFoundError, version

from glm3cli.version import __version__


def versions(*packages: str) -> dict[str, str]:
    """The version of glm3 and those of `packages`; `absent` for what isn't installed."""
    return {"glm3": __version__} | {name: _version_of(name) for name in packages}


@functools.cache
def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
