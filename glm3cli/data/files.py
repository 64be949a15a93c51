"""Finds the input files: what paths, folders and globs stand for, and what format a file has."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from glm3cli.config.preprocess import PIPE
from glm3cli.errors import DataError

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
}
_COMPRESSED = (".gz", ".zst")
_log = logging.getLogger(__name__)


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The files that the inputs (files, folders, globs) stand for, in order.

    Raises:
        DataError: Something isn't there, or isn't of a format that can be read.
    """
    files = [file for path in inputs for file in _expand(path)]
    for file in files:
        if file != PIPE:
            format_of(file)
    return files


def has_format(path: Path) -> bool:
    """Whether a file of that name can be read."""
    return _format(path) is not None


def format_of(path: Path) -> str:
    """The format of a file by its name.

    Raises:
        DataError: The name says nothing known.
    """
    kind = _format(path)
    if kind is None:
        known = ", ".join([*FORMATS, *(f".jsonl{suffix}" for suffix in _COMPRESSED)])
        raise DataError(f"{path} has a format that is not known", f"known are {known}")
    return kind


def _expand(path: Path) -> list[Path]:
    if path == PIPE:
        return [path]
    if path.is_dir():
        return _folder_files(path)
    if path.exists():
        return [path]
    if any(mark in str(path) for mark in "*?["):
        root = Path(path.anchor)
        found = root.glob(str(path.relative_to(root)))
        # As in a shell: a hidden file only where the pattern asks for one.
        hidden = path.name.startswith(".")
        files = sorted(
            name for name in found if name.is_file() and name.name.startswith(".") == hidden
        )
        if files:
            return files
        raise DataError(f"no file matches {path}", "check the pattern, and quote it in the shell")
    raise DataError(f"input {path} does not exist", "give a file, a folder or a quoted glob")


def _folder_files(folder: Path) -> list[Path]:
    """The files of the most frequent format, so that a README.txt doesn't become data."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    counts = Counter(kind for path in files if (kind := _format(path)))
    if not counts:
        raise DataError(f"folder {folder} has no file to read", f"known are {', '.join(FORMATS)}")
    (kind, most), *others = counts.most_common()
    if others and others[0][1] == most:
        raise DataError(
            f"folder {folder} has as many {kind} files as {others[0][0]} files",
            f"say which: --input '{folder}/*.SUFFIX'",
        )
    if others:
        named = ", ".join(f"{count} {name}" for name, count in others)
        _log.warning("%s: reading its %d %s files, not its %s", folder, most, kind, named)
    return [path for path in files if _format(path) == kind]


def _format(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        inner = FORMATS.get(Path(path.stem).suffix.lower())
        return None if inner in ("parquet", "arrow") else inner
    return FORMATS.get(suffix)
