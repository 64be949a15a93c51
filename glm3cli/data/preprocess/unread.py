"""Refuses what a row or a turn holds that would be lost: no sample has a place for it."""

import re

from glm3cli.data.preprocess.fields import Row, RowError, shown
from glm3cli.data.preprocess.trained import is_trained

# Where pictures, films and sounds stand, in a row or a turn: LLaMA-Factory, ms-swift, and sets of
# questions about pictures.
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# The column of a text that a question is about, as in sets for reading comprehension.
CONTEXT = "context"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# The keys of an answer that name tools and are known.
_TOOL_KEYS = {"tool_calls", "function_call", "tool_call_id", "tool_name", "tools", "functions"}
# A key with one of these words seems to hold calls; "recall" and "locally" don't have one.
_CALL_WORD = re.compile(r"tools?(?:calls?|uses?)?|(?:function|func|api)?calls?")
_WORD = re.compile(r"[A-Z]*[a-z]+|[A-Z]+")


def check_no_media(row: Row, within: str = "") -> None:
    """Raises RowError if a row or a turn has pictures, films or sounds.

    Args:
        row: The row, or a turn in it.
        within: Which field of the row the turn is; "" for the row itself.
    """
    for name in MEDIA:
        if row.get(name):
            place = f"{within}.{name}" if within else name
            raise RowError(place, f"expected text alone, got {shown(row[name])}: leave it out")


def check_no_context(row: Row) -> None:
    """Raises RowError if a question has a context, which belongs to it in a way that isn't known.

    The column `input` stands below a question, so it is the way out.
    """
    if row.get(CONTEXT):
        way_out = "name it input to put it below the question, or leave it out"
        raise RowError(CONTEXT, f"isn't read, got {shown(row[CONTEXT])}: {way_out}")


def check_no_other_calls(turn: Row, place: str) -> None:
    """Raises RowError if an answer has a key that seems to hold calls, but isn't known."""
    for key, value in turn.items():
        words = (word.lower() for word in _WORD.findall(key))
        if value and key not in _TOOL_KEYS and any(map(_CALL_WORD.fullmatch, words)):
            raise RowError(f"{place}.{key}", "isn't known; give the calls of tools as tool_calls")


def check_no_thoughts(turn: Row, place: str) -> None:
    """Raises RowError if a trained turn has thoughts beside its content, which isn't trained."""
    for name in _THOUGHTS:
        said = turn.get(name) is not True and turn.get(name)  # true switches thinking on
        if said and is_trained(turn, place):
            way_out = "leave it out, or for GLM-Z1 write it into the content, as <think>"
            problem = f"isn't read, since ChatGLM3 has no place for thoughts: {way_out}"
            raise RowError(f"{place}.{name}", problem)
