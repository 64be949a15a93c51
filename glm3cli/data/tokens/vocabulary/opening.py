"""Opens the vocabulary in a folder, whichever kind it is of."""

from pathlib import Path
from typing import Any

from glm3cli.config.family.members import VocabularyKind
from glm3cli.data.tokens.vocabulary.base import Vocabulary
from glm3cli.data.tokens.vocabulary.files import FILE_NAME, find_vocabulary
from glm3cli.data.tokens.vocabulary.pieces import Pieces
from glm3cli.data.tokens.vocabulary.pieces_json import has_pieces
from glm3cli.data.tokens.vocabulary.ranks import Ranks, has_ranks
from glm3cli.errors import DataError
from glm3cli.host.parsing import read_json


def open_vocabulary(path: Path) -> Vocabulary:
    """Reads a vocabulary.

    Args:
        path: A tokenizer.model, a tokenizer.json, or a folder that has one.

    Raises:
        DataError: The file is missing or has neither kind of vocabulary.
    """
    file = find_vocabulary(path) or path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"tokenizer {file} does not exist",
            f"give a model folder that has a {FILE_NAME}, or that file",
        )
    content = _content(file)
    return Ranks(file, content) if _kind(file, content) == "tiktoken" else Pieces(file, content)


def kind_of(file: Path) -> VocabularyKind:
    """Returns the kind of a file's vocabulary, which needn't be a whole one.

    Raises:
        DataError: It is a tokenizer.json that isn't valid JSON.
    """
    return _kind(file, _content(file))


def _kind(file: Path, content: Any) -> VocabularyKind:
    """Returns the kind of a vocabulary by its file, or by the content of a tokenizer.json."""
    is_ranks = has_ranks(file) if content is None else not has_pieces(content)
    return "tiktoken" if is_ranks else "sentencepiece"


def _content(file: Path) -> Any:
    """Returns the content of a tokenizer.json; None for a tokenizer.model.

    Raises:
        DataError: It isn't valid JSON.
    """
    if file.suffix != ".json":
        return None
    try:
        return read_json(file) or {}
    except ValueError as error:
        raise DataError(
            f"tokenizer {file} is not valid JSON: {error}", f"fetch {file.name} again"
        ) from None
