"""Rows of any form: a handler encodes them, or says in a sentence what is wrong.

The check is run on a few rows here, and on thousands by `pytest -m slow`.
"""

import datetime
from typing import Any

import pytest
from hypothesis import strategies as st

from glm3cli.config.preprocess import HANDLERS
from glm3cli.data.kinds import WEIGHTS_KEY
from glm3cli.data.preprocess.fields import RowError
from tests.support.fuzz import check, templated

KEYS = [
    "text", "instruction", "input", "output", "system", "history", "tools", "functions", "messages",
    "conversations", "chat", "prompt", "chosen", "rejected", "label", "completion", "role", "from",
    "content", "value", "tool_calls", "function_call", "function", "name", "arguments", "args",
    "parameters", "observation", "loss", "weight", "train", "loss_scale", "metadata", "type",
    "turn_1", "Human", "MOSS", "code_with_problem", "code_only", "explanation_only", "title",
    "question_body", "answer_body", "conversation", "human", "assistant", "system_prompt",
    "question", "answer", "context", "images", "tool_call_id", "id", "reasoning_content",
    "rejected_messages",
]  # fmt: skip
ROLES = ["system", "user", "assistant", "observation", "tool", "human", "gpt", "function_call"]
ODD = [0, 1, 0.5, 10**30, float("nan"), "\ud800", "", " ", "[", '{"name": "f"}', b"x"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(ODD)
    | st.sampled_from(ROLES)
    | st.just(datetime.datetime(2020, 1, 1))
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=10,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(ROLES) | VALUES,
        "from": st.sampled_from(ROLES) | VALUES,
        "content": st.text(max_size=6) | VALUES,
        "value": st.text(max_size=6) | VALUES,
        "tool_calls": VALUES,
        "function_call": VALUES,
        "loss": SCALARS,
        "weight": SCALARS,
        "parameters": VALUES,
        "observation": VALUES,
        "name": SCALARS,
        "tools": VALUES,
        "tool_call_id": SCALARS | VALUES,
    },
)
ANY_ROW = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(KEYS, VALUES),
        "messages": st.lists(TURN, max_size=4) | VALUES,
        "conversations": st.lists(TURN, max_size=4) | VALUES,
        "conversation": st.lists(TURN, max_size=4) | VALUES,
        "instruction": st.text(max_size=6) | VALUES,
        "output": st.text(max_size=6) | VALUES,
    },
)


def check_row(name: str, template: str, row: dict[str, Any]) -> None:
    """A handler encodes a row, or says what is wrong with it."""
    conversational = HANDLERS[name] in ("instruction", "chat")
    found = templated(name, template if conversational else "")
    try:
        document = found.encode(row)
    except RowError:
        return
    weights = document.sequences.pop(WEIGHTS_KEY, [])
    assert all(len(weight) == 1 for weight in weights)  # a number for each sample
    for sequences in zip(*document.sequences.values(), strict=False):
        assert len({len(ids) for ids in sequences}) == 1
        assert len(sequences[0])


ANY = {
    "name": st.sampled_from(sorted(HANDLERS)),
    "template": st.sampled_from(["chatglm3", "modellink"]),
    "row": ANY_ROW,
}


def test_rows_of_any_form() -> None:
    check(80, check_row, **ANY)


@pytest.mark.slow
def test_many_rows_of_any_form() -> None:
    check(6000, check_row, **ANY)
