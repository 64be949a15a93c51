r"""Converts the tokenizer into files that transformers reads without remote code.

tokenizer.json is the file that Hugging Face's `tokenizers` loads. It has the same BPE as the
sentencepiece model, with merges rebuilt from the pieces, whose scores are their ranks. The ids are
the same as those of `Tokenizer`, with one exception that comes from `tokenizers`: text that spells
a special token becomes that token, while ChatGLM3's own tokenizer leaves it text. There are eleven
such spellings: the nine special tokens, `</s>` and `<unk>` (`sop` and `eop` only as whole words).
For text from others, call the tokenizer with `split_special_tokens=True`, which leaves it text.

The chat template needs special tokens, but nobody may end a turn by writing `<|user|>` into it. So
the template puts a mark into every spelling of a special token in a message. The normalizer, which
runs after the special tokens have been found, removes the mark again.
"""

import json
from typing import Any

import sentencepiece

from glm3cli.data.tokens.chat import TOOL_PROMPT
from glm3cli.data.tokens.tokenizer import SPACE, SPECIAL_TOKENS, Tokenizer, only_prepends_space
from glm3cli.errors import DataError

_WORDS = tuple(name for name in SPECIAL_TOKENS if name.isalpha())
# Two of Unicode's noncharacters, which no text should hold.
_MARK = "\ufdd0\ufdd1"
# Metadata and content of a turn are encoded apart (see `chat`), each with a space in front, so the
# template writes the space of the content. Tools are written as by json.dumps(tools, indent=4),
# and tool calls as by chat.call_text.
_CHAT_TEMPLATE = r"""
{%- macro plain(text) -%}
{%- set broken = namespace(text=text) %}
{%- for name in SPECIAL %}
{%- set broken.text = broken.text | replace(name, name[0] ~ 'BREAK' ~ name[1:]) %}
{%- endfor %}
{{- broken.text }}
{%- endmacro -%}
{%- macro turn(role, metadata, content) -%}
{{- '<|' ~ role ~ '|>' ~ plain(metadata) ~ '\n' }}
{%- if content %}{{ ' ' ~ plain(content) }}{% endif %}
{%- endmacro -%}
{{- '[gMASK]sop' }}
{%- if tools and (not messages or messages[0].role != 'system') %}
{{- turn('system', '', TOOL_PROMPT ~ '\n' ~ tools | tojson(indent=4)) }}
{%- endif %}
{%- for message in messages %}
{%- set content = message.content or '' %}
{%- if content is not string %}{{ raise_exception('the content must be a string') }}{% endif %}
{%- if message.role == 'system' %}
{%- set given = tools if loop.first and tools else none %}
{%- set listed = given if message.tools is undefined or message.tools is none else message.tools %}
{{- turn('system', '', content if listed is none
    else (content or TOOL_PROMPT) ~ '\n' ~ listed | tojson(indent=4)) }}
{%- elif message.role == 'tool' %}
{{- turn('observation', '', content) }}
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}
{%- set call = call.function if call.function else call %}
{%- set listed = namespace(text=[]) %}
{%- for name, value in call.arguments.items() %}
{%- set listed.text = listed.text + ['%s=%r' | format(name, value)] %}
{%- endfor %}
{{- turn('assistant', call.name,
    '```python\ntool_call(' ~ listed.text | join(', ') ~ ')\n```') }}
{%- endfor %}
{%- elif message.role in ['user', 'assistant', 'observation'] %}
{{- turn(message.role, message.metadata or '', content) }}
{%- else %}
{{- raise_exception('role ' ~ message.role ~ ' is unknown') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
""".strip()


def check_fast(tokenizer: Tokenizer) -> None:
    """Checks that a tokenizer.json can encode as the sentencepiece model does.

    Raises:
        DataError: It can't; says why.
    """
    reason = _obstacle(tokenizer.pieces, _normal(tokenizer.pieces))
    if reason:
        raise DataError(
            f"tokenizer {tokenizer.path} can't be written as tokenizer.json: {reason}",
            "glm3 exports BPE models of ChatGLM3's kind",
        )


def to_fast(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of a tokenizer.json that encodes as the sentencepiece model does.

    Raises:
        DataError: No tokenizer.json can; says why.
    """
    check_fast(tokenizer)
    pieces = tokenizer.pieces
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, name) for i, name in _added(tokenizer).items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"String": _MARK}, "content": ""},
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _post_processor(tokenizer, pieces.id_to_piece(tokenizer.eos_id)),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())},
            "merges": _merges(pieces, _normal(pieces)),
        },
    }


def to_fast_config(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Returns the content of the tokenizer_config.json that belongs to `to_fast`'s file.

    Args:
        tokenizer: The tokenizer.
        length: The longest sequence that the model was trained on, in tokens.
    """
    pieces = tokenizer.pieces
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "eos_token": pieces.id_to_piece(tokenizer.eos_id),
        "pad_token": pieces.id_to_piece(tokenizer.pad_id),
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "chat_template": _chat_template(list(_added(tokenizer).values())),
    }


def _chat_template(names: list[str]) -> str:
    """Returns the chat template, which breaks up `names` where they stand in messages."""
    text = _CHAT_TEMPLATE.replace("BREAK", _MARK).replace("SPECIAL", json.dumps(names))
    return text.replace("TOOL_PROMPT", json.dumps(TOOL_PROMPT))


def _added(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the ids and names of the tokens that `tokenizers` finds in text by their spelling."""
    ids = (tokenizer.pieces.unk_id(), tokenizer.eos_id)
    special = {tokenizer.special(name): name for name in SPECIAL_TOKENS}
    return {i: tokenizer.pieces.id_to_piece(i) for i in ids} | special


def _normal(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Returns the pieces that stand for text (no bytes, no control pieces), with their ids."""
    return {
        pieces.id_to_piece(i): i
        for i in range(pieces.get_piece_size())
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))
    }


def _obstacle(pieces: sentencepiece.SentencePieceProcessor, normal: dict[str, int]) -> str | None:
    """Returns why a tokenizer.json can't encode as the model does, or None if it can.

    It tries out what the model does, since sentencepiece doesn't let its settings be read.
    """
    scores = [pieces.get_score(i) for i in normal.values()]
    # A Unigram model's scores are logarithms; those of pieces that a user has defined are all 0.
    if any(score != int(score) for score in scores) or len({*scores}) < len(scores):
        return "it is no plain BPE model"
    if sum(map(pieces.is_byte, range(pieces.get_piece_size()))) != 256:
        return "it has no byte fallback"
    if not only_prepends_space(pieces):
        return "it changes text or its spaces"
    if any("\n" in name for name in normal):
        return "it has pieces with line breaks"
    names = [name for name in SPECIAL_TOKENS if name in normal]
    if names:
        return f"it has pieces that are called as special tokens: {', '.join(names)}"
    return None


def _merges(
    pieces: sentencepiece.SentencePieceProcessor, normal: dict[str, int]
) -> list[list[str]]:
    """Returns every pair of pieces that joins to a third, by falling score of the third."""
    found = [
        (-pieces.get_score(i), normal[name[:k]], normal[name[k:]], [name[:k], name[k:]])
        for name, i in normal.items()
        for k in range(1, len(name))
        if name[:k] in normal and name[k:] in normal
    ]
    return [parts for *_, parts in sorted(found)]


def _added_token(i: int, name: str) -> dict[str, Any]:
    return {
        "id": i,
        "content": name,
        "single_word": name in _WORDS,  # else "sop" in "philosophy" would be a token
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _post_processor(tokenizer: Tokenizer, eos: str) -> dict[str, Any]:
    """Returns the step that puts `[gMASK] sop` in front; a pair of texts ends with `eos`.

    Both are as in ChatGLM3's own tokenizer.
    """
    prefix = ("[gMASK]", "sop")
    ids = {name: tokenizer.special(name) for name in prefix} | {eos: tokenizer.eos_id}
    start = [{"SpecialToken": {"id": name, "type_id": 0}} for name in prefix]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*start, first],
        "pair": [*start, first, second, end],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()
        },
    }
