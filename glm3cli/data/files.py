"""Finds input files: expands paths, folders and globs, and tells a file's format by its name."""

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
    """Returns the files that the inputs name, in the order of the inputs.

    Args:
        inputs: Files, folders, globs, or `config.preprocess.PIPE` for standard input.

    Raises:
        DataError: An input doesn't exist, a glob matches no file, or a file has an unknown format.
    """
    files = [file for path in inputs for file in _expand(path)]
    for file in files:
        if file != PIPE:
            format_of(file)
    return files


def has_format(path: Path) -> bool:
    """Returns whether the file's name ends as one of a format that preprocess reads."""
    return _format(path) is not None


def format_of(path: Path) -> str:
    """Returns the format of a file by its name: one of the values of `FORMATS`.

    Raises:
        DataError: The name has no known ending.
    """
    file_format = _format(path)
    if file_format is None:
        known = ", ".join([*FORMATS, *(f".jsonl{suffix}" for suffix in _COMPRESSED)])
        raise DataError(f"{path} has a format that is not known", f"known are {known}")
    return file_format


def _expand(path: Path) -> list[Path]:
    """Returns the files that one input names."""
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
    """Returns a folder's files of its most frequent format, at any depth, without hidden files.

    Files of other formats are left out, so that a README.txt doesn't become data.

    Raises:
        DataError: The folder has no file to read, or two formats are equally frequent.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    counts = Counter(found for path in files if (found := _format(path)))
    if not counts:
        raise DataError(f"folder {folder} has no file to read", f"known are {', '.join(FORMATS)}")
    (main_format, most), *others = counts.most_common()
    if others and others[0][1] == most:
        raise DataError(
            f"folder {folder} has as many {main_format} files as {others[0][0]} files",
            f"say which: --input '{folder}/*.SUFFIX'",
        )
    if others:
        named = ", ".join(f"{count} {name}" for name, count in others)
        _log.warning("%s: reading its %d %s files, not its %s", folder, most, main_format, named)
    return [path for path in files if _format(path) == main_format]


def _format(path: Path) -> str | None:
    """Returns the format of a file by its name, or None if the ending is unknown."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        inner = FORMATS.get(Path(path.stem).suffix.lower())
        return None if inner in ("parquet", "arrow") else inner
    return FORMATS.get(suffix)
