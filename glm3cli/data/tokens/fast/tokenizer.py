r"""Converts the tokenizer into files that transformers reads without remote code.

tokenizer.json is the file that Hugging Face's `tokenizers` loads. The ids are the same as those of
`Tokenizer`, with one exception that comes from `tokenizers`: text that spells a special token
becomes that token, while the models' own tokenizers leave it text. For text from others, call the
tokenizer with `split_special_tokens=True`, which leaves it text.
"""

from dataclasses import asdict
from typing import Any

from glm3cli.data.tokens.fast import pieces, ranks
from glm3cli.data.tokens.formats.templates import complete
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.data.tokens.vocabulary.pieces import Pieces
from glm3cli.data.tokens.vocabulary.ranks import Ranks
from glm3cli.errors import DataError


def check_fast(tokenizer: Tokenizer) -> None:
    """Checks that a tokenizer.json can encode as the tokenizer does.

    Raises:
        DataError: It can't; says why.
    """
    vocabulary = tokenizer.vocabulary
    if not isinstance(vocabulary, Pieces):
        return
    reason = pieces.obstacle(vocabulary, list(tokenizer.special_tokens))
    if reason:
        raise DataError(
            f"tokenizer {tokenizer.path} can't be written as tokenizer.json: {reason}",
            "glm3 exports BPE models of ChatGLM3's kind",
        )


def to_fast(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of a tokenizer.json that encodes as the tokenizer does.

    Raises:
        DataError: No tokenizer.json can; says why.
    """
    check_fast(tokenizer)
    vocabulary = tokenizer.vocabulary
    parts = ranks.parts(vocabulary) if isinstance(vocabulary, Ranks) else {}
    if isinstance(vocabulary, Pieces):
        parts = pieces.parts(vocabulary)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _all_added(tokenizer),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _post_processor(tokenizer),
        "decoder": parts["decoder"],
        "model": parts["model"],
    }


def to_fast_config(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Returns the content of the tokenizer_config.json that belongs to `to_fast`'s file.

    Args:
        tokenizer: The tokenizer.
        length: The longest sequence that the model was trained on, in tokens.
    """
    added = _added(tokenizer)
    template = complete(tokenizer.chat.template, list(added.values()))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "eos_token": added[tokenizer.eos_id],
        "pad_token": added[tokenizer.pad_id],
        **_unknown(tokenizer),
        "additional_special_tokens": list(tokenizer.special_tokens),
        **({"chat_template": template} if template else {}),
    }


def _unknown(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the token for what can't be encoded, if the vocabulary has one."""
    vocabulary = tokenizer.vocabulary
    return {"unk_token": vocabulary.name(0)} if isinstance(vocabulary, Pieces) else {}


def _added(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the ids and names of the tokens that `tokenizers` finds in text by their spelling."""
    vocabulary = tokenizer.vocabulary
    own = pieces.controls(vocabulary) if isinstance(vocabulary, Pieces) else {}
    return own | {i: name for name, i in tokenizer.special_tokens.items()}


def _all_added(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns the entries of all tokens that are found in text: special ones, and a user's."""
    entries = [_added_token(i, name) for i, name in _added(tokenizer).items()]
    entries += [asdict(token) for token in tokenizer.added.tokens.values()]
    ours = {"takes_space"}  # no field of the file, whose normalizer shows it
    return [
        {name: value for name, value in entry.items() if name not in ours}
        for entry in sorted(entries, key=lambda entry: entry["id"])
    ]


def _added_token(i: int, name: str) -> dict[str, Any]:
    return {
        "id": i,
        "content": name,
        "single_word": name.isalpha(),  # else "sop" in "philosophy" would be a token
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the step that puts the prefix in front; a pair of texts ends with the end token.

    Both are as in the models' own tokenizers.
    """
    names = _added(tokenizer)
    prefix, end = [names[i] for i in tokenizer.prefix], names[tokenizer.eos_id]
    ids = dict(zip(prefix, tokenizer.prefix, strict=True)) | {end: tokenizer.eos_id}
    start = [{"SpecialToken": {"id": name, "type_id": 0}} for name in prefix]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    last = {"SpecialToken": {"id": end, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*start, first],
        "pair": [*start, first, second, last],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()
        },
    }
