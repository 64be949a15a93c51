"""Parses `--data`: the weights and prefixes of preprocessed files, without opening the files.

A prefix is the path of a data set's files without what follows it in their names (see
`kinds.DataKind.file_names`).
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glm3cli.data.files import has_format
from glm3cli.data.kinds import INSTRUCTION_KEYS, KINDS, DataKind
from glm3cli.errors import ConfigError, DataError
from glm3cli.host.files import expanded
from glm3cli.host.fingerprints import fingerprint
from glm3cli.host.parsing import read_yaml

_WEIGHTED = re.compile(r"(\d+(?:\.\d+)?):(.+)")


@dataclass(frozen=True)
class Blend:
    """The data sets that a training mixes.

    Attributes:
        prefixes: The prefix of each data set.
        weights: The relative share of each data set in the samples, above 0 and in the order of
            `prefixes`; None if the shares follow from the data sets' sizes.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(
    data: list[str], kind: DataKind, prepared: Mapping[str, str] | None = None
) -> Blend:
    """Parses the items of `--data` and checks that the files of every data set exist.

    An item is `WEIGHT:PREFIX`, `PREFIX`, or a YAML file that holds a list of such items, whose
    paths are relative to the YAML file's folder.

    Args:
        data: The items.
        kind: The kind of data that the training reads.
        prepared: For items that are raw data: by the name of the raw data, the prefix of the files
            that were made from it.

    Raises:
        ConfigError: Only some items have a weight, all weights are 0, or a YAML file has some
            other content.
        DataError: A file is missing.
    """
    named = read_blend(data)
    blend = Blend(tuple((prepared or {}).get(name, name) for name in named.prefixes), named.weights)
    for prefix in blend.prefixes:
        check_files(prefix, kind)
    return blend


def read_blend(data: list[str]) -> Blend:
    """Parses the items of `--data` as `parse_blend` does, but does not look for the files.

    Raises:
        ConfigError: Only some items have a weight, all weights are 0, or a YAML file has some
            other content.
        DataError: A YAML file is missing.
    """
    items = [part for item in data for part in _expanded(item)]
    given = [weight for _, weight in items if weight is not None]
    if given and len(given) < len(items):
        raise ConfigError(
            f"--data {' '.join(data)}: some have a weight and some don't",
            "write WEIGHT:PREFIX for each, or for none",
        )
    if not given:
        return Blend(tuple(prefix for prefix, _ in items), None)
    # Megatron-core's blending would take some samples of a data set whose weight is 0.
    weighted = [(prefix, weight) for prefix, weight in items if weight]
    if not weighted:
        raise ConfigError(f"--data {' '.join(data)}: all weights are 0", "give one above 0")
    prefixes, weights = zip(*weighted, strict=True)
    return Blend(prefixes, weights)


def _expanded(item: str) -> list[tuple[str, float | None]]:
    """Returns the prefix and the weight, if one is given, of an item, or of all in a YAML file."""
    path = Path(item)
    if path.suffix not in (".yaml", ".yml"):
        return [_weighted(item)]
    if not path.is_file():
        raise DataError(f"--data {item} does not exist", "give a YAML file with a list of prefixes")
    try:
        entries = read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"--data {item} is no YAML file: {error}", "mend it") from None
    is_list_of_text = isinstance(entries, list) and all(
        isinstance(entry, str) and entry.strip() for entry in entries
    )
    if not (entries and is_list_of_text):
        raise ConfigError(
            f"--data {item} holds no list of prefixes", "write a line '- WEIGHT:PREFIX' for each"
        )
    return [_weighted(entry, path.parent) for entry in entries]


def _weighted(item: str, folder: Path = Path()) -> tuple[str, float | None]:
    """Splits an item into prefix and weight; None for no weight.

    Args:
        item: The item. What looks like a weight belongs to the name if there are such files.
        folder: What the prefix is relative to.
    """
    match = _WEIGHTED.fullmatch(item)
    prefix, weight = (match[2], float(match[1])) if match else (item, None)
    if match and _is_there(str(folder / item)):
        prefix, weight = item, None
    home = expanded(prefix)
    return (home if folder == Path() else str(folder / home)), weight


def _is_there(item: str) -> bool:
    """Returns whether there is a file or folder of this name, or preprocessed files."""
    with suppress(OSError):  # a name is too long
        paths = [Path(item), *(Path(f"{kind.main_file(item)}.idx") for kind in KINDS)]
        return any(path.exists() for path in paths)
    return False


def check_files(prefix: str, kind: DataKind) -> None:
    """Checks that all files of a data set exist.

    Raises:
        DataError: A file is missing; the hint names the data sets that are in the same folder. Or
            the prefix for texts is that of a single file of instructions.
    """
    meant, inner = _kind_and_prefix(prefix)
    if not kind.marker and meant.marker:
        raise DataError(
            f"--data {prefix} is a file of instructions, whose questions {kind.usage} would learn, "
            "too",
            f"use {meant.usage} --data {inner}",
        )
    for name in kind.file_names(prefix):
        for suffix in (".idx", ".bin"):
            if not Path(name + suffix).is_file():
                raise DataError(f"--data {prefix}: {name}{suffix} does not exist", _hint(prefix))


def data_fingerprint(prefix: str, kind: DataKind) -> str:
    """Returns the size of a data set and a hash of its content; see `host.fingerprints`.

    It depends on the content alone, not on where the files are.

    Raises:
        OSError: A file can't be read.
    """
    names = kind.present_files(prefix)
    return fingerprint([Path(name + suffix) for name in names for suffix in (".idx", ".bin")])


def is_raw(item: str, kind: DataKind) -> bool:
    """Returns whether an item of `--data` is raw data rather than a prefix of preprocessed files.

    Raw data is a folder, or a path with the ending of a format that preprocess reads.
    """
    with suppress(OSError):  # such a name is too long for a file
        if any(Path(f"{name}.idx").exists() for name in kind.file_names(item)):
            return False
    path = Path(item)
    return has_format(path) or path.is_dir()


def _hint(prefix: str) -> str:
    """Returns advice for a missing data set: what is there instead, or how to make it."""
    folder, name = Path(prefix).parent, Path(prefix).name
    near = sorted(folder.glob(f"{name}*.idx")) if folder.is_dir() else []
    found: dict[DataKind, set[str]] = {kind: set() for kind in KINDS}
    for path in (str(path.with_suffix("")) for path in near):
        kind, prefix = _kind_and_prefix(path)
        found[kind].add(prefix)
    options = [f"{kind.usage} --data {p}" for kind in KINDS for p in sorted(found[kind])]
    if options:
        return "these are there: " + "; ".join(options)
    return (
        "name raw data with its ending (.jsonl, .parquet), or make the files with `glm3 preprocess "
        "--output-prefix` (--handler text for pretrain, instruction or chat for finetune; "
        "preference or feedback for its other methods)"
    )


def _kind_and_prefix(path: str) -> tuple[DataKind, str]:
    """Returns the kind of data that a file pair is of by its name, and its `--data` prefix."""
    for kind in KINDS:
        for key in INSTRUCTION_KEYS if kind.marker else ():
            ending = kind.key_file("", key)
            if path.endswith(ending):
                return kind, path.removesuffix(ending)
    return KINDS[-1], path
