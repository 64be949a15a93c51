"""Opens the vocabulary in a folder, whichever kind it is of."""

from pathlib import Path

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
    if file.suffix != ".json":
        return Ranks(file) if has_ranks(file) else Pieces(file)
    try:
        content = read_json(file)
    except ValueError as error:
        raise DataError(
            f"tokenizer {file} is not valid JSON: {error}", f"fetch {file.name} again"
        ) from None
    return Pieces(file, content) if has_pieces(content) else Ranks(file, content)
