"""Every form of row, against what it should become written out by hand, and rows that don't fit."""

import json
from pathlib import Path

import pytest

from glm3cli.config.preprocess import HANDLERS, PreprocessConfig
from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.preprocess.handlers import Handler, build_handler, choose_columns
from glm3cli.data.tokens.chat import build_sample
from glm3cli.data.tokens.messages import Message
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import ConfigError, DataError
from tests.support.shared import SHARED, needs_shared
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

CALL = "```python\ntool_call(city='北京', days=2, now=True)\n```"
TOOLS = [{"name": "get_weather"}]
USE_TOOLS = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)


def handler(name: str, tokenizer: Tokenizer | None = None, **options: object) -> Handler:
    config = PreprocessConfig.parse(
        {
            "input": [Path("data.jsonl")],
            "tokenizer": tiny_tokenizer_folder(),
            "output_prefix": Path("out"),
            "handler": name,
            **options,
        }
    )
    return build_handler(config, tokenizer or tiny_tokenizer())


def parsed(name: str, row: dict) -> list[list[Message]]:
    return handler(name).conversations(row)


def test_alpaca_rows_with_history():
    row = {
        "system": "be kind",
        "instruction": "the fox",
        "input": "jumps",
        "output": "over",
        "history": [["a", "b"], ["c", "d"]],
    }
    assert parsed("chat", row) == [
        [
            Message("system", "be kind"),
            Message("user", "a"),
            Message("assistant", "b"),
            Message("user", "c"),
            Message("assistant", "d"),
            Message("user", "the fox\njumps"),
            Message("assistant", "over"),
        ]
    ]


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("prompt", "completion"),
        ("prompt", "response"),
        ("query", "response"),
        ("question", "answer"),
        ("content", "summary"),
    ],
)
def test_rows_with_a_question_and_its_answer(asked, answered):
    row = {"id": "7", asked: "the fox", answered: "jumps"}
    expected = [Message("user", "the fox"), Message("assistant", "jumps")]
    assert parsed("chat", row) == [expected]
    more = {"system_prompt": "be kind", "history": [["a", "b"]], "input": "a dog"}
    before = [Message("system", "be kind"), Message("user", "a"), Message("assistant", "b")]
    joined = [Message("user", "the fox\na dog"), Message("assistant", "jumps")]
    assert parsed("chat", row | more) == [[*before, *joined]]
    columns = [*row, *more, "context", "images"]
    assert set(choose_columns(handler("chat"), columns)) == set(columns) - {"id"}
    assert set(choose_columns(handler("chat"), list(row))) == {asked, answered}
    with pytest.raises(RowError, match=f"{answered}: expected a string"):
        parsed("chat", row | {answered: 5})


def test_a_question_and_its_answer_may_be_turns():
    row = {
        "prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    turns = [Message("system", "be kind"), Message("user", "a"), Message("assistant", "b")]
    assert parsed("chat", row) == [turns]


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "toxic": False}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"human": "a", "assistant": "b"}],
        '[{"human": "a", "assistant": "b"}]',
    ],
)
def test_a_conversation_of_turns_or_of_pairs(turns):
    """As WildChat and LMSYS-Chat-1M have it, and as ms-swift does."""
    expected = [Message("system", "be kind"), Message("user", "a"), Message("assistant", "b")]
    assert parsed("chat", {"conversation": turns, "system": "be kind"}) == [expected]


def test_openai_rows_with_tool_calls():
    arguments = {"city": "北京", "days": 2, "now": True}
    row = {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "天气"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"function": {"name": "get_weather", "arguments": json.dumps(arguments)}}
                ],
            },
            {"role": "tool", "content": "20"},
            {"role": "assistant", "content": "很 好", "loss": False},
        ],
    }
    assert parsed("chat", row) == [
        [
            Message("system", "", tools=TOOLS),
            Message("user", "天气"),
            Message("assistant", "", "get_weather", arguments=arguments),
            Message("observation", "20"),
            Message("assistant", "很 好", loss=False),
        ]
    ]


def test_share_gpt_rows_with_function_calls():
    call = {"name": "get_weather", "arguments": {"city": "北京", "days": 2, "now": True}}
    row = {
        "system": "be kind",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "天气"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "20"},
            {"from": "gpt", "value": "好"},
        ],
    }
    assert parsed("chat", row) == [
        [
            Message("system", "be kind", tools=TOOLS),
            Message("user", "天气"),
            Message("assistant", "", "get_weather", arguments=call["arguments"]),
            Message("observation", "20"),
            Message("assistant", "好"),
        ]
    ]


def test_an_empty_list_of_tools_adds_no_system_turn():
    row = {"tools": "[]", "conversations": [{"from": "gpt", "value": "hi"}]}
    assert parsed("chat", row) == [[Message("assistant", "hi")]]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Human: a\nAssistant: b\nHuman: c\nAssistant:", ["a", "b", "c", "d"]),
        ("Human: a\nAssistant: b\nHuman: c", ["a", "b", "c", "d"]),
        ("\nHuman: a", ["a", "d"]),
        ("What is a?", ["What is a?", "d"]),
        ("Human: a\nAssistant: say Assistant: b\nHuman: c", ["a", "say Assistant: b", "c", "d"]),
    ],
)
def test_belle_rows_hold_earlier_turns_in_the_instruction(instruction, expected):
    row = {"instruction": instruction, "output": " d "}
    turns = [("user", "assistant")[i % 2] for i in range(len(expected))]
    belle = "BelleMultiTurnInstructionHandler"
    assert parsed(belle, row) == [list(map(Message, turns, expected))]
    [[*_, asked, _]] = parsed(belle, {**row, "input": "more"})
    assert asked == Message("user", f"{expected[-2]}\nmore")
    assert parsed(belle, {**row, "instruction": f"be kind\n{instruction}"})[0][0].content


MOSS = {
    "turn_1": {"Human": "<|Human|>: a<eoh>\n", "MOSS": "<|MOSS|>: b<eom>\n"},
    "turn_2": {"Human": "<|Human|>: c<eoh>\n", "MOSS": "<|MOSS|>: d<eom>\n"},
    "turn_3": None,
}


def test_moss_rows_make_one_chat_or_a_sample_per_answer():
    first = [Message("user", "a"), Message("assistant", "b")]
    both = [*first, Message("user", "c"), Message("assistant", "d")]
    assert parsed("MOSSMultiTurnHandler", {"chat": MOSS}) == [both]
    assert parsed("chat", {"chat": MOSS}) == [both]
    assert parsed("MOSSInstructionHandler", {"chat": MOSS}) == [first, both]
    assert len(handler("MOSSInstructionHandler").encode({"chat": MOSS}).sequences["labels"]) == 2


def test_leetcode_rows():
    row = {"code_with_problem": "sum it ```x```", "code_only": "y", "explanation_only": "z"}
    assert parsed("LeetcodePythonInstructionHandler", row) == [
        [Message("user", "sum it"), Message("assistant", "y\nz")]
    ]


def test_texts_made_of_several_columns():
    row = {"title": "t", "question_body": "q", "answer_body": "a"}
    text = rows.stack_overflow_text(row)
    assert text == "In python, t\n### Question:\nq\n### Response:\na\n"
    [ids] = handler("StackOverflowPythonPretrainHandler").encode(row).sequences["text"]
    tokenizer = tiny_tokenizer()
    assert list(ids) == [*tokenizer.prefix, *tokenizer.encode(text)]
    assert "None" not in rows.alpaca_text({"instruction": "a", "input": "", "output": "b"})


def test_text_gets_prefix_and_end_and_an_empty_text_nothing():
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer.prefix, *tokenizer.encode("the fox")]
    [plain] = handler("text").encode({"text": "the fox"}).sequences["text"]
    assert list(plain) == ids
    [ended] = handler("text", append_eod=True).encode({"text": "the fox"}).sequences["text"]
    assert list(ended) == [*ids, 2]
    assert handler("text", append_eod=True).encode({"text": ""}).sequences == {}


def test_instruction_in_modellinks_text():
    """The text written out; leading, trailing and doubled line breaks are real."""
    tokenizer = tiny_tokenizer()
    for extra in ("", "jumps"):
        row = {"instruction": "the fox", "input": extra, "output": "over"}
        prompt = (
            "\nBelow is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request. Please "
            "note that you need to think through your response logically and step by step.\n"
            f"### Instruction:\nthe fox\n{extra}\n### Response:\n"
        )
        ids = [*tokenizer.prefix, *tokenizer.encode(f"{prompt}over\n"), 2]
        hidden = 2 + len(tokenizer.encode(prompt))
        document = handler("instruction", append_eod=True).encode(row).sequences
        assert document["input_ids"] == [ids]
        assert document["attention_mask"] == [[1] * len(ids)]
        assert document["labels"] == [[-100] * hidden + ids[hidden:]]


def test_instruction_in_chatglm3s_form_is_a_chat_of_two_turns():
    row = {"instruction": "the fox", "input": None, "output": "over", "history": [["x", "y"]]}
    document = handler("instruction", template="chatglm3").encode(row).sequences
    conversation = [Message("user", "the fox"), Message("assistant", "over")]
    assert document["input_ids"] == [build_sample(tiny_tokenizer(), conversation).input_ids]


def test_too_short_a_sequence_length_drops_the_sample_and_counts_it():
    row = {"instruction": "the fox " * 30, "output": "over"}
    document = handler("chat", seq_length=16).encode(row)
    assert document.sequences == {}
    assert document.num_dropped == 1


@needs_shared
def test_real_function_calls_in_plain_form():
    """The conversations of a public set, derived once more by hand."""
    tokenizer = Tokenizer.load(SHARED / "chatglm3-6b")
    data = json.loads((SHARED / "data" / "toolcall_zh.json").read_text("utf-8"))[:40]
    chat = handler("chat", tokenizer)
    for row in data:
        ids, labels = list(tokenizer.prefix), [-100, -100]
        was_answer = False

        def turn(role: str, metadata: str, content: str) -> None:
            nonlocal was_answer
            tokens = tokenizer.encode(f"{metadata}\n") + tokenizer.encode(content)
            special = tokenizer.special(f"<|{role}|>")
            ids.extend([special, *tokens])  # noqa: B023
            answer = role == "assistant"
            labels.append(special if was_answer else -100)  # noqa: B023
            labels.extend(tokens if answer else [-100] * len(tokens))  # noqa: B023
            was_answer = answer

        tools = json.loads(row["tools"])
        if tools:
            shown = json.dumps(tools, indent=4, ensure_ascii=False)
            turn("system", "", f"{USE_TOOLS}\n{shown}")
        for said in row["conversations"]:
            if said["from"] == "function_call":
                call = json.loads(said["value"])
                listed = ", ".join(f"{k}={v!r}" for k, v in call["arguments"].items())
                turn("assistant", call["name"], f"```python\ntool_call({listed})\n```")
            else:
                role = {"human": "user", "gpt": "assistant"}.get(said["from"], said["from"])
                turn(role, "", said["value"])
        sequences = chat.encode(row).sequences
        assert sequences["input_ids"] == [[*ids, 2]]
        assert sequences["labels"] == [[*labels, 2 if was_answer else -100]]


@pytest.mark.parametrize(
    ("name", "row", "field", "problem"),
    [
        ("text", {"text": 5}, "text", "expected a string, got int 5"),
        ("text", {"text": [64790, 64792]}, "text", "expected a string, got list"),
        ("text", {"body": "a"}, "text", "is missing; the row has body"),
        ("text", {"text": None}, "text", "expected a string, got NoneType"),
        ("instruction", {"instruction": "a"}, "output", "is missing"),
        ("instruction", {"instruction": "a", "output": "b", "input": 3}, "input", "got int 3"),
        ("chat", {"messages": "hi"}, "messages", "expected a list"),
        ("chat", {"messages": []}, "messages", "at least one turn"),
        ("chat", {"messages": ["hi"]}, "messages[0]", "expected an object"),
        ("chat", {"messages": [{"role": "robot"}]}, "messages[0].role", "expected one of"),
        ("chat", {"messages": [{"role": ["user"]}]}, "messages[0].role", "expected one of"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "row", "one assistant turn"),
        ("chat", {"conversations": [{"from": "gpt", "value": 1}]}, "conversations[0].value", "int"),
        ("chat", {"conversations": [{"from": "x"}]}, "conversations[0].from", "expected one of"),
        (
            "chat",
            {"conversations": [{"from": "function_call", "value": "nope"}]},
            "conversations[0]",
            "expected JSON",
        ),
        ("chat", {"conversations": [{"from": "gpt", "value": "a"}], "tools": "["}, "tools", "JSON"),
        ("chat", {"instruction": "a", "output": "b", "history": [["c"]]}, "history[0]", "answer"),
        ("chat", {"text": "a"}, "row", "expected messages, conversations"),
        ("MOSSMultiTurnHandler", {"chat": "a"}, "chat", "expected turns"),
        (
            "BelleMultiTurnInstructionHandler",
            {"instruction": "Human: a\nAssistant: b", "output": "c"},
            "instruction",
            "got the answer str 'b'",
        ),
        ("chat", {"conversation": [{"human": "a"}, "b"]}, "conversation[0].assistant", "missing"),
        ("chat", {"question": "a", "answer": "b", "context": "c"}, "context", "name it input"),
        ("chat", {"messages": [{"role": "user", "content": "a"}], "image": "b"}, "image", "alone"),
        ("instruction", {"instruction": "a", "output": "b", "videos": "c"}, "videos", "text alone"),
    ],
)
def test_a_row_that_does_not_fit_names_its_field(name, row, field, problem):
    with pytest.raises(RowError) as caught:
        handler(name).encode(row)
    assert caught.value.field == field
    assert problem in caught.value.problem


def test_missing_columns_are_named_with_those_that_are_there():
    with pytest.raises(DataError, match="needs the column text, but has a, b"):
        choose_columns(handler("text"), ["a", "b"])
    assert choose_columns(handler("instruction"), ["id", "output", "input", "instruction"]) == [
        "output",
        "input",
        "instruction",
    ]
    assert choose_columns(handler("text"), ["input", "text"]) == ["text"]


def test_unknown_handlers_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean GeneralInstructionHandler"):
        handler("GeneralInstructHandler")
    assert all(handler(name) for name in HANDLERS)


def test_text_takes_no_options_of_conversations():
    with pytest.raises(ConfigError, match="go with the handlers instruction, chat"):
        handler("text", seq_length=128)
