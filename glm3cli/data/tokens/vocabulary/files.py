"""The names of the files that have a vocabulary; imports nothing heavy."""

from pathlib import Path

FILE_NAME = "tokenizer.model"
# What the folders of GLM-4-0414 and CodeGeeX4 have instead.
JSON_NAME = "tokenizer.json"


def usual_name(file: Path) -> str:
    """Returns the name under which a vocabulary's file, whatever its name, is found in a folder."""
    return JSON_NAME if file.suffix == ".json" else FILE_NAME


def find_vocabulary(folder: Path) -> Path | None:
    """Returns the file of a folder's vocabulary; None if there is none."""
    paths = (folder / name for name in (FILE_NAME, JSON_NAME))
    return next((path for path in paths if path.is_file()), None)
