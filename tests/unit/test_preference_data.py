"""Rows of preference data, in every form that others document, become pairs and feedback."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.preprocess.preferences.handlers import cut_prompts
from glm3cli.data.preprocess.run import preprocess
from glm3cli.data.tokens.chat import build_prompt, build_sample
from glm3cli.data.tokens.messages import Message, Sample
from glm3cli.errors import DataError
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

KEYS = ("input_ids", "attention_mask", "labels")
TOOLS = [{"name": "weather"}]
SYSTEM = Message("system", "be quick")
ASKED = Message("user", "the fox")
GOOD, BAD = "the lazy dog", "seven wizards"
USER = {"role": "user", "content": "the fox"}
BE = {"role": "system", "content": "be quick"}
YES, NO = ({"role": "assistant", "content": text} for text in (GOOD, BAD))
# By name: a row, and the prompt that it stands for.
PAIRS: dict[str, tuple[dict[str, Any], list[Message]]] = {
    "TRL, texts": ({"prompt": "the fox", "chosen": GOOD, "rejected": BAD}, [ASKED]),
    "TRL, turns": ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [ASKED]),
    "TRL, no prompt": ({"chosen": [USER, YES], "rejected": [USER, NO]}, [ASKED]),
    "messages": ({"messages": [USER], "chosen": YES, "rejected": NO}, [ASKED]),
    "messages with tools": (
        {"messages": [USER], "tools": json.dumps(TOOLS), "chosen": GOOD, "rejected": BAD},
        [Message("system", "", tools=TOOLS), ASKED],
    ),
    "OpenAI": (
        {
            "input": {"messages": [{"role": "system", "content": "be quick"}, USER]},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
        [SYSTEM, ASKED],
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "the fox"}],
            "system": "be quick",
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        [SYSTEM, ASKED],
    ),
    "alpaca": (
        {
            "instruction": "the",
            "input": "fox",
            "history": [["quick", "brown"]],
            "chosen": GOOD,
            "rejected": BAD,
        },
        [Message("user", "quick"), Message("assistant", "brown"), Message("user", "the\nfox")],
    ),
    "ms-swift": ({"messages": [USER, YES], "rejected_response": BAD}, [ASKED]),
    "ms-swift, turns": ({"messages": [USER, YES], "rejected_messages": [USER, NO]}, [ASKED]),
    "ms-swift, an answer": ({"messages": [USER, YES], "rejected_messages": [NO]}, [ASKED]),
    "whole answers": (
        {"prompt": "the fox", "chosen": [USER, YES], "rejected": [USER, NO]},
        [ASKED],
    ),
    "one whole answer": ({"prompt": [USER], "chosen": [USER, YES], "rejected": NO}, [ASKED]),
    "the prompt with more space": (
        {"prompt": "the fox\n", "chosen": [USER, YES], "rejected": [USER, NO]},
        [Message("user", "the fox\n")],
    ),
    "whole answers with a system turn": (
        {"prompt": "the fox", "chosen": [BE, USER, YES], "rejected": [BE, USER, NO]},
        [SYSTEM, ASKED],
    ),
    "whole answers beside a system text": (
        {
            "question": "the fox",
            "system": "be quick",
            "chosen": [USER, YES],
            "rejected": [USER, NO],
        },
        [SYSTEM, ASKED],
    ),
    "messages are the chosen ones": (
        {"messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, NO]},
        [ASKED],
    ),
    "OpenAI, whole": (
        {
            "input": {"messages": [USER]},
            "preferred_output": [USER, YES],
            "non_preferred_output": [USER, NO],
        },
        [ASKED],
    ),
    "no prompt, but tools and a system text": (
        {
            "chosen": [USER, YES],
            "rejected": [USER, NO],
            "tools": TOOLS,
            "system_prompt": "be quick",
        },
        [Message("system", "be quick", tools=TOOLS), ASKED],
    ),
    "a question with an input": (
        {"question": "the", "input": "fox", "chosen": GOOD, "rejected": BAD},
        [Message("user", "the\nfox")],
    ),
    "an unread conversation beside": (
        {"prompt": "the fox", "messages": [USER, YES], "chosen": GOOD, "rejected": BAD},
        [ASKED],
    ),
}
FEEDBACK: dict[str, tuple[dict[str, Any], int]] = {
    "TRL, texts": ({"prompt": "the fox", "completion": GOOD, "label": True}, 1),
    "TRL, turns": ({"prompt": [USER], "completion": [YES], "label": False}, 2),
    "answer": ({"prompt": "the fox", "answer": GOOD, "label": 0}, 2),
    "messages": ({"messages": [USER, YES], "label": True}, 1),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "the fox"},
                {"from": "gpt", "value": GOOD},
            ],
            "kto_tag": True,
        },
        1,
    ),
    "alpaca": ({"instruction": "the fox", "output": GOOD, "kto_tag": False}, 2),
    "a whole answer": ({"prompt": "the fox", "completion": [USER, YES], "label": 1.0}, 1),
    "a question": ({"question": "the fox", "answer": [YES], "label": "0"}, 2),
    "messages beside a question": ({"messages": [USER, YES], "question": "x", "label": True}, 1),
    "LMSYS-Chat-1M": ({"conversation": [USER, YES], "label": "1.0"}, 1),
    "CSV": ({"prompt": "the fox", "completion": GOOD, "label": "1"}, 1),
}


def run(folder: Path, rows: list[dict[str, Any]], handler: str, **options: Any) -> Any:
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"input": [source], "tokenizer": tiny_tokenizer_folder(), "handler": handler}
    return preprocess(
        PreprocessConfig.parse({**values, "output_prefix": folder / "out", "workers": 1, **options})
    )


def written(folder: Path, marker: str) -> list[tuple[list[int], ...]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    files = [IndexedDataset(str(folder / f"out_{marker}_{key}_document")) for key in KEYS]
    return [tuple(file[i].tolist() for file in files) for i in range(len(files[0]))]


def sample(prompt: list[Message], answer: str) -> Sample:
    """An answer whose prompt isn't trained, not even its own answers."""
    tokenizer = tiny_tokenizer()
    whole = build_sample(tokenizer, [*prompt, Message("assistant", answer)])
    start = len(build_prompt(tokenizer, prompt))
    return Sample(whole.input_ids, [-100] * start + whole.input_ids[start:])


@pytest.mark.parametrize("form", PAIRS)
def test_a_pair_is_two_segments_of_a_sample(tmp_path, form):
    row, prompt = PAIRS[form]
    assert run(tmp_path, [row], "preference").documents == 1
    chosen, rejected = sample(prompt, GOOD), sample(prompt, BAD)
    [(ids, segments, labels)] = written(tmp_path, "pairs")
    assert ids == chosen.input_ids + rejected.input_ids
    assert labels == chosen.labels + rejected.labels
    assert segments == [1] * len(chosen.input_ids) + [2] * len(rejected.input_ids)


@pytest.mark.parametrize("form", FEEDBACK)
def test_an_answers_segment_id_says_whether_it_was_liked(tmp_path, form):
    row, number = FEEDBACK[form]
    run(tmp_path, [row], "feedback")
    expected = sample([ASKED], GOOD)
    [(ids, segments, labels)] = written(tmp_path, "feedback")
    assert (ids, labels) == (expected.input_ids, expected.labels)
    assert segments == [number] * len(ids)


def test_the_calls_of_a_chosen_answer_are_trained(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    chosen = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    run(tmp_path, [{"messages": [USER], "chosen": chosen, "rejected": BAD}], "preference")
    [(ids, segments, labels)] = written(tmp_path, "pairs")
    expected = build_sample(
        tiny_tokenizer(),
        [ASKED, Message("assistant", "```python\ntool_call(city='北京')\n```", "weather")],
    )
    size = segments.count(1)
    assert ids[:size] == expected.input_ids
    assert labels[:size] == expected.labels


def test_answers_of_several_turns_follow_what_they_have_in_common(tmp_path):
    """A rejected answer that took another path is trained on its own turns, not the chosen's."""
    turns = [
        [{"role": "assistant", "content": "over"}, {"role": "tool", "content": "dog"}, YES],
        [{"role": "assistant", "content": "jumps"}, {"role": "tool", "content": "quick"}, NO],
    ]
    row = {"messages": [USER, *turns[0]], "rejected_messages": [USER, *turns[1]]}
    run(tmp_path, [row], "preference")
    [(ids, _, labels)] = written(tmp_path, "pairs")
    expected = [
        build_sample(
            tiny_tokenizer(),
            [
                ASKED,
                Message("assistant", first),
                Message("observation", seen),
                Message("assistant", last),
            ],
        )
        for first, seen, last in (("over", "dog", GOOD), ("jumps", "quick", BAD))
    ]
    assert ids == expected[0].input_ids + expected[1].input_ids
    assert labels == expected[0].labels + expected[1].labels


def test_equal_answers_are_left_out_and_counted(tmp_path):
    rows = [
        {"prompt": "the fox", "chosen": GOOD, "rejected": BAD},
        {"prompt": "the fox", "chosen": GOOD, "rejected": GOOD},
    ]
    summary = run(tmp_path, rows, "preference")
    assert (summary.documents, summary.equal, summary.skipped) == (1, 1, 1)
    with pytest.raises(DataError, match=r"no document to write \(1 rows skipped\)"):
        run(tmp_path, rows[1:], "preference")


def test_long_prompts_are_cut_from_the_left_and_long_answers_dropped(tmp_path):
    long = {"prompt": "quick brown " * 20 + "the fox", "chosen": GOOD, "rejected": BAD}
    too_long = {"prompt": "the fox", "chosen": GOOD * 10, "rejected": BAD}
    summary = run(tmp_path, [long, too_long], "preference", seq_length=24)
    assert (summary.documents, summary.truncated, summary.skipped) == (1, 1, 1)
    [(ids, segments, labels)] = written(tmp_path, "pairs")
    prompt = [Message("user", long["prompt"])]
    chosen, rejected = sample(prompt, GOOD), sample(prompt, BAD)
    over = max(len(chosen.input_ids), len(rejected.input_ids)) - 24
    prefix = len(tiny_tokenizer().prefix)
    for number, whole in ((1, chosen), (2, rejected)):
        places = [i for i, segment in enumerate(segments) if segment == number]
        cut = whole.input_ids[:prefix] + whole.input_ids[prefix + over :]
        assert [ids[i] for i in places] == cut
        assert [labels[i] for i in places if labels[i] != -100] == [
            label for label in whole.labels if label != -100
        ]


def test_a_prompt_is_cut_down_to_the_token_before_the_answer():
    whole = [Sample([7, 8, 1, 2, 3, 4], [-100] * 4 + [3, 4])]
    assert cut_prompts(whole, 2, 5) == [Sample([7, 8, 2, 3, 4], [-100] * 3 + [3, 4])]
    assert cut_prompts(whole, 2, 4) is None
    assert cut_prompts(whole, 2, 6) is whole


@pytest.mark.parametrize("handler", ["preference", "feedback"])
def test_a_pack_keeps_pairs_together_and_what_was_thought_of_them(tmp_path, handler):
    answers = [f"{GOOD} " * (i % 3 + 1) for i in range(7)]
    if handler == "preference":
        rows: list[dict[str, Any]] = [
            {"prompt": "fox", "chosen": one, "rejected": one + BAD} for one in answers
        ]
    else:
        rows = [
            {"prompt": "fox", "completion": one, "label": i % 2 == 0}
            for i, one in enumerate(answers)
        ]
    marker = "pairs" if handler == "preference" else "feedback"
    run(tmp_path, rows, handler, seq_length=40)
    singles = written(tmp_path, marker)
    run(tmp_path, rows, handler, seq_length=40, pack=True)
    packs = written(tmp_path, marker)
    assert len(packs) < len(singles)
    room = 80 if handler == "preference" else 40
    found = []
    for ids, segments, labels in packs:
        assert len(ids) <= room
        for place in sorted({(segment - 1) // 2 for segment in segments}):
            at = [i for i, segment in enumerate(segments) if (segment - 1) // 2 == place]
            own = [segments[i] - 2 * place for i in at]
            found.append(([ids[i] for i in at], own, [labels[i] for i in at]))
    assert sorted(found) == sorted(singles)


@pytest.mark.parametrize(
    ("handler", "row", "sentence"),
    [
        ("preference", {"prompt": "a", "chosen": "b", "rejected": None}, "rejected expected a str"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": [USER]}, "end, got user"),
        ("preference", {"chosen": "a", "rejected": "b"}, "prompt is missing"),
        ("preference", {"chosen": [USER, YES], "rejected": [YES]}, "begins as the better one"),
        ("preference", {"messages": [USER], "rejected_response": "b"}, "ends with an assistant"),
        ("preference", {"messages": [{"role": "who"}], "chosen": "b", "rejected": "c"}, "who"),
        ("preference", {"prompt": "a", "chosen": "b"}, "rejected is missing"),
        (
            "preference",
            {"prompt": "a", "chosen": [USER, YES], "rejected": "c"},
            "chosen expected an answer, or a conversation that begins with the prompt",
        ),
        (
            "preference",
            {"messages": [USER, YES], "chosen": GOOD, "rejected": BAD},
            "chosen answers a prompt that ends with an answer",
        ),
        (
            "preference",
            {"prompt": "the fox", "chosen": [BE, USER, YES], "rejected": [USER, NO], "system": "x"},
            "expected the system text of the prompt",
        ),
        (
            "preference",
            {"messages": [USER, YES], "rejected_messages": [{**USER, "content": "a"}, NO]},
            "rejected_messages expected a conversation that begins as the better one",
        ),
        ("preference", {"prompt": "a", "context": "x", "chosen": "b", "rejected": "c"}, "context"),
        ("preference", {"prompt": "a", "images": ["x"], "chosen": "b", "rejected": "c"}, "images"),
        ("feedback", {"prompt": "a", "completion": [USER, YES], "label": 1}, "completion expected"),
        ("feedback", {"prompt": "a", "completion": "b", "label": 0.5}, "true or false"),
        ("feedback", {"prompt": "a", "completion": "b", "label": "good"}, "true or false"),
        ("feedback", {"prompt": "a", "completion": "b", "label": None}, "true or false"),
        ("feedback", {"messages": [USER], "label": True}, "ends with an assistant"),
        ("feedback", {"messages": [USER, YES]}, "label expected true or false"),
    ],
)
def test_a_row_of_no_form_is_named(tmp_path, handler, row, sentence):
    with pytest.raises(DataError, match=sentence):
        run(tmp_path, [row], handler)
