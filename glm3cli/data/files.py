"""Finds input files: expands paths, folders and globs, and tells a file's format by its name."""

import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from glm3cli.config.preprocess import PIPE
from glm3cli.data.folders import (
    by_split,
    check_link,
    folder_files,
    is_output,
    visible_files,
    warn,
)
from glm3cli.errors import DataError

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """Returns the files that the inputs name, in the order of the inputs.

    Args:
        inputs: Files, folders, globs, or `config.preprocess.PIPE` for standard input.

    Raises:
        DataError: An input doesn't exist, a glob matches no file, a link leads nowhere, or a file
            has an unknown format.
    """
    files = []
    for path in inputs:
        try:
            files += _expand(path)
        except OSError as error:  # a name that is too long
            raise DataError(f"input {path} can't be found: {error}", "give another path") from None
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
    check_link(path)
    if path.is_dir():
        return folder_files(path, _format)
    if path.exists():
        return [path]
    if _is_pattern(path):
        return _matching(path)
    raise DataError(f"input {path} does not exist", "give a file, a folder or a quoted glob")


def _matching(pattern: Path) -> list[Path]:
    """Returns the files that match a pattern as in a shell, and says it if they mix splits.

    What preprocess itself has written about its output is left out.

    Raises:
        DataError: No file matches, or a link that does leads nowhere.
    """
    found = sorted(matching_paths(pattern))
    for path in found:
        check_link(path)
    files = [path for path in found if path.is_file() and not is_output(path)]
    if not files:
        raise DataError(
            f"no file matches {pattern}", "check the pattern, and quote it in the shell"
        )
    splits = by_split(files, Path(os.path.commonpath([path.parent for path in files])))
    if len(splits) > 1 and ("validation" in splits or "test" in splits):
        named = ", ".join(f"{len(paths)} {split or 'other'}" for split, paths in splits.items())
        warn(f"{pattern} matches files of several splits, all of which are read: {named}")
    return files


def matching_paths(pattern: Path) -> Iterable[Path]:
    """Returns the paths that match a pattern; a hidden one only where the pattern asks for it.

    Links to folders are followed. Path.glob does that in `*`, but not in `**`.
    """
    if "**" in pattern.parts:
        place = pattern.parts.index("**")
        base, rest = Path(*pattern.parts[:place]), pattern.parts[place + 1 :]
        return [
            path
            for folder in (matching_paths(base) if _is_pattern(base) else [base])
            if folder.is_dir()
            for path in visible_files(folder)
            if _fits(path.relative_to(folder).parts, rest)
        ]
    root, is_hidden = Path(pattern.anchor), pattern.name.startswith(".")
    found = root.glob(str(pattern.relative_to(root)))
    return [path for path in found if path.name.startswith(".") == is_hidden]


def _is_pattern(path: Path) -> bool:
    return any(mark in str(path) for mark in "*?[")


def _fits(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Returns whether the last parts of a path match patterns; `**` stands for any parts."""
    if "**" in patterns:
        place = patterns.index("**")
        fitting = (i for i in range(len(parts) + 1) if _fits(parts[:i], patterns[:place]))
        return any(_fits(parts[i:], patterns[place + 1 :]) for i in fitting)
    last = parts[max(0, len(parts) - len(patterns)) :]
    return len(last) == len(patterns) and all(map(fnmatchcase, last, patterns))


def _format(path: Path) -> str | None:
    """Returns the format of a file by its name, or None if the ending is unknown."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        inner = FORMATS.get(Path(path.stem).suffix.lower())
        return None if inner in ("parquet", "arrow") else inner
    return FORMATS.get(suffix)
