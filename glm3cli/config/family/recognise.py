"""Finds which member of the family a folder holds, by its files."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm3cli.config.family.members import CHATGLM2, MEMBERS, Member, RopeKind, VocabularyKind
from glm3cli.host.parsing import read_json

_BY_NAME = {member.name.lower(): member for member in MEMBERS}
# The members whose traits a folder has that shows nothing more than the kind of its tokenizer.
_USUAL: dict[VocabularyKind, Member] = {
    "sentencepiece": _BY_NAME["chatglm3-6b"],
    "tiktoken": _BY_NAME["glm-4-9b-chat"],
}
# How the code of chatglm2-6b-32k divides positions, and how later code multiplies the base
# (RotaryEmbedding of modeling_chatglm.py).
_DIVIDES = re.compile(r"arange\([^\n]*/\s*(?:self\.)?rope_ratio")
_MULTIPLIES = re.compile(r"base\s*\*\s*(?:self\.)?rope_ratio")


def recognise(folder: Path, kind: VocabularyKind | None = None) -> Member:
    """Returns the member that a folder holds, or one with the same traits.

    What counts, in this order: the name in config.json or tokenizer_config.json; the folder's own
    tokenizer code, of which ChatGLM2's knows no roles; and the values of config.json.

    Args:
        folder: A folder with a config.json, tokenizer files, or both.
        kind: The kind of the folder's tokenizer, which the member must have; None if it isn't
            known.
    """
    return known(folder, kind) or _USUAL[kind or "sentencepiece"]


def known(folder: Path, kind: VocabularyKind | None = None) -> Member | None:
    """Returns the member that the files of a folder show; None if they show none.

    See `recognise` for the arguments.
    """
    config = _content(folder / "config.json")
    found = [_named(config, folder), _by_code(folder), _by_values(config)]
    return next((one for one in found if one and kind in (None, one.tokens.kind)), None)


def rope_kind(config: Mapping[str, Any], path: Path) -> RopeKind:
    """Returns what rope_ratio of a config.json in the original form does.

    What counts, in this order: the config.json's own `rope_kind`, which glm3 writes; the folder's
    own modelling code; the member that the name or the values show.

    Args:
        config: The content of the config.json.
        path: The file, beside which the code may lie.
    """
    if config.get("rope_kind") in ("base", "positions"):
        return "base" if config["rope_kind"] == "base" else "positions"
    code = _text(path.parent / "modeling_chatglm.py")
    if _DIVIDES.search(code):
        return "positions"
    if _MULTIPLIES.search(code):
        return "base"
    return rope_kind_by_values(config, _named(config, path.parent))


def rope_kind_by_values(config: Mapping[str, Any], member: Member | None = None) -> RopeKind:
    """Returns what rope_ratio does in a member, or in the one that a config.json's values show.

    Args:
        config: The content of a config.json.
        member: The member, if its name is known.
    """
    member = member or _by_values(config)
    return member.rope if member else "base"


def _named(config: Mapping[str, Any], folder: Path) -> Member | None:
    """Returns the member whose name the files of a folder hold; None if it is none's."""
    for content in (config, _content(folder / "tokenizer_config.json")):
        name = content.get("_name_or_path", content.get("name_or_path"))
        if isinstance(name, str):
            member = _BY_NAME.get(name.rstrip("/").rpartition("/")[2].lower())
            if member:
                return member
    return None


def _by_code(folder: Path) -> Member | None:
    """Returns a member with the traits of a folder's tokenizer code; None if it has none.

    ChatGLM2's writes rounds, and ChatGLM3's the tokens of roles.
    """
    code = _text(folder / "tokenization_chatglm.py")
    if "sentencepiece" not in code:
        return None
    if "<|user|>" in code:
        return _USUAL["sentencepiece"]
    return next(one for one in MEMBERS if one.tokens is CHATGLM2) if "[Round " in code else None


def _by_values(config: Mapping[str, Any]) -> Member | None:
    """Returns the member that shows most of the values of a config.json; None if none does."""
    fitting = [one for one in MEMBERS if one.shows and all(_agreements(one, config))]
    return max(fitting, key=lambda one: len(one.shows), default=None)


def _agreements(member: Member, config: Mapping[str, Any]) -> Iterator[bool]:
    """Yields whether a config.json has each of the values that show a member."""
    for name, value in member.shows.items():
        yield config.get(name) == value


def _content(path: Path) -> Mapping[str, Any]:
    """Returns the content of a JSON file; nothing if it isn't there or holds no object."""
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    """Returns the text of a file; "" if it isn't there."""
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""
