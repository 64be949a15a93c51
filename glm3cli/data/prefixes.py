"""`--data`: weights and prefixes of preprocessed files, checked without opening anything heavy."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glm3cli.data.files import has_format
from glm3cli.errors import ConfigError, DataError

DataKind = Literal["pretrain", "finetune"]
INSTRUCTION_KEYS = ("input_ids", "attention_mask", "labels")
_WEIGHTED = re.compile(r"(\d+(?:\.\d+)?):(.+)")


@dataclass(frozen=True)
class Blend:
    """Where the samples come from.

    Attributes:
        prefixes: Paths of the files without `.bin` and `.idx`.
        weights: Share of each prefix, above 0, or None where they follow from the sizes.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def instruction_file(prefix: str, key: str) -> str:
    """Prefix of one of the three files of an instruction data set (ModelLink's names)."""
    return f"{prefix}_packed_{key}_document"


def parse_blend(
    data: list[str], kind: DataKind, prepared: Mapping[str, str] | None = None
) -> Blend:
    """Reads `WEIGHT:PREFIX` or `PREFIX` items and checks that their files are there.

    An item may be a YAML file with a list of such items; its paths begin at its folder.

    Args:
        data: The items.
        kind: Of the training.
        prepared: By the name of raw data, the prefix of the files that were made of it.

    Raises:
        ConfigError: Only some items have a weight, or all weights are 0; or a YAML file has
            something else in it.
        DataError: A file is missing.
    """
    named = read_blend(data)
    blend = Blend(tuple((prepared or {}).get(name, name) for name in named.prefixes), named.weights)
    for prefix in blend.prefixes:
        check_files(prefix, kind)
    return blend


def read_blend(data: list[str]) -> Blend:
    """Reads the items as `parse_blend` does, and looks for no files.

    Raises:
        ConfigError: As in `parse_blend`.
        DataError: A YAML file is missing.
    """
    data = [part for item in data for part in _expanded(item)]
    matches = [_WEIGHTED.fullmatch(item) for item in data]
    if any(matches) != all(matches):
        raise ConfigError(
            f"--data {' '.join(data)}: some have a weight and some don't",
            "write WEIGHT:PREFIX for each, or for none",
        )
    parts = [
        (match[2], float(match[1])) if match else (item, 1.0)
        for match, item in zip(matches, data, strict=True)
    ]
    # Megatron-core's blending would take some samples of a part that weighs nothing.
    parts = [(prefix, weight) for prefix, weight in parts if weight]
    if not parts:
        raise ConfigError(f"--data {' '.join(data)}: all weights are 0", "give one above 0")
    prefixes, weights = zip(*parts, strict=True)
    return Blend(prefixes, weights if all(matches) else None)


def _expanded(item: str) -> list[str]:
    path = Path(item)
    if path.suffix not in (".yaml", ".yml"):
        return [item]
    import yaml

    if not path.is_file():
        raise DataError(f"--data {item} does not exist", "give a YAML file with a list of prefixes")
    try:
        parts = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = str(error).replace("\n", " ")
        raise ConfigError(f"--data {item} is no YAML file: {problem}", "mend it") from None
    if not (isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts)):
        raise ConfigError(
            f"--data {item} holds no list of prefixes", "write a line '- WEIGHT:PREFIX' for each"
        )
    found = []
    for part in parts:
        match = _WEIGHTED.fullmatch(part)
        weight, prefix = (f"{match[1]}:", match[2]) if match else ("", part)
        found.append(f"{weight}{path.parent / prefix}")
    return found


def check_files(prefix: str, kind: DataKind) -> None:
    """Checks that the files of a prefix are there.

    Raises:
        DataError: One is missing.
    """
    for name in file_names(prefix, kind):
        for suffix in (".idx", ".bin"):
            if not Path(name + suffix).is_file():
                raise DataError(f"--data {prefix}: {name}{suffix} does not exist", _hint(prefix))


def is_raw(item: str, kind: DataKind) -> bool:
    """Whether an item of `--data` is raw, not the prefix of files that preprocess has written."""
    if any(Path(f"{name}.idx").exists() for name in file_names(item, kind)):
        return False
    path = Path(item)
    return has_format(path) or path.is_dir()


def file_names(prefix: str, kind: DataKind) -> list[str]:
    """The names of the files of a prefix, without `.bin` and `.idx`."""
    if kind == "pretrain":
        return [prefix]
    return [instruction_file(prefix, key) for key in INSTRUCTION_KEYS]


def _hint(prefix: str) -> str:
    folder, name = Path(prefix).parent, Path(prefix).name
    near = sorted(folder.glob(f"{name}*.idx")) if folder.is_dir() else []
    found = {str(path.with_suffix("")) for path in near}
    packed = {path.split("_packed_")[0] for path in found if "_packed_" in path}
    plain = {path for path in found if "_packed_" not in path}
    options = [f"finetune --data {p}" for p in sorted(packed)]
    options += [f"pretrain --data {p}" for p in sorted(plain)]
    if options:
        return "these are there: " + "; ".join(options)
    return (
        "name raw data with its ending (.jsonl, .parquet), or make the files with `glm3 preprocess "
        "--output-prefix` (--handler text for pretrain, instruction or chat for finetune)"
    )
