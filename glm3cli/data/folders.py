"""Finds the data files of a folder, at any depth.

Links are followed. Files of a data set's validation and test splits are left out beside others, and
so is what describes a data set of Hugging Face's: `datasets.save_to_disk` writes a folder of Arrow
files with a state.json that lists them, in a folder for each split if there are several. Left out,
too, are what `datasets` keeps of earlier maps (cache-*.arrow), names that begin with `_`, which
Spark and pyarrow pass over (such as Delta Lake's _delta_log), and what preprocess itself has
written about token files beside it.
"""

import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from glob import escape
from pathlib import Path

from glm3cli.errors import DataError

# The words by which a name says the split of a file (source: the data files' names that Hugging
# Face datasets recognises, in its data_files.py).
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_STATE = "state.json"
_DESCRIPTIONS = {_STATE, "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
# What `datasets` keeps of a map or a filter beside the data, by a fingerprint (source: its
# arrow_dataset.py).
_CACHE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")
# What the names of files end with that tell about the output of preprocess.
_ENDINGS = (".stats.json", ".errors.jsonl")
_log = logging.getLogger(__name__)

# Returns the format of a file by its name, or None if it has none that is known.
FormatOf = Callable[[Path], str | None]


def folder_files(folder: Path, format_of: FormatOf) -> list[Path]:
    """Returns a folder's files of its most frequent format, at any depth, without hidden files.

    Files of other formats are left out, so that a README.txt doesn't become data, and so are those
    of validation and test splits unless there is nothing else.

    Args:
        folder: The folder.
        format_of: Tells the format of a file.

    Raises:
        DataError: The folder has no file to read, several splits but none to train on, or two
            formats that are equally frequent; or a link in it leads nowhere, or a folder in it
            can't be read.
    """
    files = _without_caches(folder, _without_marked(folder, sorted(_data_files(folder, format_of))))
    if not files:
        raise DataError(f"folder {folder} has no file to read", "give one with files of data")
    files = _of_one_split(folder, files)
    counts = Counter(map(format_of, files))
    (main_format, most), *others = counts.most_common()
    if others and others[0][1] == most:
        raise DataError(
            f"folder {folder} has as many {main_format} files as {others[0][0]} files",
            f"say which: --input '{folder}/*.SUFFIX'",
        )
    if others:
        named = ", ".join(f"{count} {name}" for name, count in others)
        warn(f"{folder}: reading its {most} {main_format} files, not its {named}")
    return [path for path in files if format_of(path) == main_format]


def is_output(path: Path) -> bool:
    """Returns whether a file was written by preprocess about token files that lie beside it.

    Args:
        path: The file, such as PREFIX.stats.json or PREFIX.errors.jsonl.
    """
    ending = next((one for one in _ENDINGS if path.name.endswith(one)), None)
    if ending is None:
        return False
    prefix = escape(path.name.removesuffix(ending))
    return any(path.parent.glob(f"{prefix}_*_document.idx"))


def visible_files(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder, at any depth, that aren't hidden, and links that lead nowhere.

    Links to folders are followed. A file or folder to which several of them lead is found once.

    Raises:
        DataError: A folder can't be read.
    """
    seen: set[Path] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        here = Path(place)
        if here.resolve() in seen:  # a link has led here before, perhaps from below
            folders.clear()
            continue
        seen.add(here.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in sorted(here / name for name in names if not name.startswith(".")):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def check_link(path: Path) -> None:
    """Raises DataError if a path is a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path} is a link to {path.readlink()}, which does not exist",
            "make what it leads to, or remove the link",
        )


def by_split(files: Iterable[Path], folder: Path) -> dict[str | None, list[Path]]:
    """Returns files by the splits that their names say, None for no split.

    Args:
        files: The files.
        folder: The folder that they are in, at any depth; its own name says nothing.
    """
    found: dict[str | None, list[Path]] = defaultdict(list)
    for path in files:
        parts = reversed(path.relative_to(folder).parts)
        found[next((split for part in parts if (split := _split_of(part))), None)].append(path)
    return found


def _split_of(name: str) -> str | None:
    """Returns the split that the name of a file or folder says; None if it says none."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    return next((split for split, names in _SPLITS.items() if words & set(names)), None)


def _of_one_split(folder: Path, files: list[Path]) -> list[Path]:
    """Returns the files of no split and of the training split, or else those of the only split."""
    splits = by_split(files, folder)
    others = {split: splits[split] for split in ("validation", "test") if split in splits}
    named = " and ".join(
        f"{len(paths)} {split} file{'s' if len(paths) > 1 else ''}"
        for split, paths in others.items()
    )
    if len(others) == len(splits) > 1:
        raise DataError(f"folder {folder} has {named}, and no others", "give those to read")
    if len(others) == len(splits):
        warn(f"{folder}: it has nothing but {named}, which are read")
        return files
    if others:
        warn(f"{folder}: not read are {named}; give them as inputs, too, to read them")
    return [path for path in files if not any(path in paths for paths in others.values())]


def _without_marked(folder: Path, files: list[Path]) -> list[Path]:
    """Returns the files whose names, and whose folders' names, don't begin with `_`."""
    marked = [path for path in files if "/_" in f"/{path.relative_to(folder).as_posix()}"]
    if marked:
        warn(f"{folder}: not read are {_named(folder, marked)}, since their names begin with _")
    return sorted(set(files) - set(marked))


def _without_caches(folder: Path, files: list[Path]) -> list[Path]:
    """Returns the files without what `datasets` keeps of earlier maps, unless that is all."""
    caches = [path for path in files if _CACHE.fullmatch(path.name)]
    if not caches or len(caches) == len(files):
        return files
    warn(f"{folder}: not read are {_named(folder, caches)}, which datasets keeps of earlier maps")
    return sorted(set(files) - set(caches))


def _named(folder: Path, files: list[Path]) -> str:
    """Names the first of some files in a folder, and the number of the others."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0].relative_to(folder)}{more}"


def _data_files(folder: Path, format_of: FormatOf) -> Iterator[Path]:
    """Yields the files of a folder that have a known format and don't describe a data set."""
    listed_in = cache(_listed)
    for path in visible_files(folder):
        if format_of(path) or not path.suffix:
            check_link(path)
        listed = listed_in(path.parent)
        is_data = path.name not in _DESCRIPTIONS if listed is None else path.name in listed
        if is_data and path.is_file() and format_of(path) and not is_output(path):
            yield path


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror}", "give a folder that can be read")


def _listed(folder: Path) -> set[str] | None:
    """Returns the files that a folder's state.json of Hugging Face datasets lists; None without.

    Raises:
        DataError: A file is missing, or the rows are a selection of those in the files.
    """
    try:
        values = json.loads((folder / _STATE).read_text("utf-8"))
        names = {entry["filename"] for entry in values["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if values.get("_indices_data_files"):
        raise DataError(f"{folder} has a selection of rows", "save it again with a newer datasets")
    for name in sorted(names):
        if not (folder / name).is_file():
            problem = f"{folder / _STATE} lists {name}, which does not exist"
            raise DataError(problem, "save the data set again")
    return names


@cache
def warn(sentence: str) -> None:
    """Logs a warning once, since a training looks at its data several times."""
    _log.warning(sentence)
