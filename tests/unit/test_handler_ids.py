"""The ids and labels of every handler, derived once more from the plain text that it should make.

ModelLink's eight as its documentation describes them; where its code does something else (the
word None for an empty input, a text cut at a wrong place, Baichuan's role ids), what their names
promise.
"""

import pytest

from glm3cli.config.preprocess import HANDLERS, PreprocessConfig
from glm3cli.data.preprocess.handlers import build_handler
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request. Please note that you need "
    "to think through your response logically and step by step."
)
ALPACA = {"instruction": "the fox", "input": "a dog", "output": "over"}
BELLE = {
    "instruction": "Human:the fox\nAssistant:jumps\nHuman:and then\nAssistant:",
    "output": "dog",
}
MOSS = {
    "chat": {
        "turn_1": {"Human": "<|Human|>: the fox<eoh>\n", "MOSS": "<|MOSS|>: jumps<eom>\n"},
        "turn_2": {"Human": "<|Human|>: and then<eoh>\n", "MOSS": "<|MOSS|>: over<eom>\n"},
    }
}
CODE = {
    "code_with_problem": "the problem\n```python\npass\n```",
    "code_only": "pass",
    "explanation_only": "it passes",
}
QUESTION = {"title": "a fox", "question_body": "over a dog?", "answer_body": "no"}
TURNS = [("user", "the fox"), ("assistant", "jumps"), ("user", "and then"), ("assistant", "over")]


def spell(text):
    return tiny_tokenizer().vocabulary.pieces.encode(text)


def special(name):
    names = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>"
    return tiny_tokenizer().vocabulary.pieces.get_piece_size() + names.split().index(name)


def start():
    return [special("[gMASK]"), special("sop")]


def chat(*turns):
    """ChatGLM3's turns; trained are the answers and what follows each."""
    ids, labels = start(), [-100, -100]
    follows_answer = False
    for role, text in turns:
        turn = [special(f"<|{role}|>"), *spell("\n"), *spell(text)]
        ids += turn
        labels += [turn[0] if follows_answer else -100]
        follows_answer = role == "assistant"
        labels += turn[1:] if follows_answer else [-100] * (len(turn) - 1)
    return [*ids, 2], [*labels, 2 if follows_answer else -100]


def modellink(*turns):
    """ModelLink's text; trained is the last answer with its line break."""
    marks = {"user": "### Instruction:", "assistant": "### Response:"}
    text = f"\n{SYSTEM}\n" + "".join(f"{marks[role]}\n{said}\n" for role, said in turns)
    ids = start() + spell(text)
    hidden = 2 + len(spell(text[: -len(turns[-1][1]) - 1]))
    return ids, [-100] * hidden + ids[hidden:]


def text(content):
    return start() + spell(content), None


ALPACA_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.USER: Below is an instruction "
    "that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nthe fox\n\n### Input:\na dog\n\n### Response: ASSISTANT: over"
)
CASES = {
    "text": ({"text": "the fox"}, lambda: [text("the fox")]),
    "GeneralPretrainHandler": ({"text": "the fox"}, lambda: [text("the fox")]),
    "AlpacaPretrainHandler": (ALPACA, lambda: [text(ALPACA_TEXT)]),
    "StackOverflowPythonPretrainHandler": (
        QUESTION,
        lambda: [text("In python, a fox\n### Question:\nover a dog?\n### Response:\nno\n")],
    ),
    "instruction": (ALPACA, lambda: [modellink(("user", "the fox\na dog"), ("assistant", "over"))]),
    "GeneralInstructionHandler": (
        {**ALPACA, "input": ""},
        lambda: [modellink(("user", "the fox\n"), ("assistant", "over"))],
    ),
    "BelleMultiTurnInstructionHandler": (
        BELLE,
        lambda: [modellink(*TURNS[:3], ("assistant", "dog"))],
    ),
    "MOSSInstructionHandler": (MOSS, lambda: [modellink(*TURNS[:2]), modellink(*TURNS)]),
    "LeetcodePythonInstructionHandler": (
        CODE,
        lambda: [modellink(("user", "the problem"), ("assistant", "pass\nit passes"))],
    ),
    "MOSSMultiTurnHandler": (MOSS, lambda: [chat(*TURNS)]),
    "chat": (
        {"messages": [{"role": role, "content": said} for role, said in TURNS]},
        lambda: [chat(*TURNS)],
    ),
    "chat, ShareGPT": (
        {
            "system": "a wizard",
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[role], "value": said}
                for role, said in TURNS
            ],
        },
        lambda: [chat(("system", "a wizard"), *TURNS)],
    ),
    "chat, alpaca": (
        {**ALPACA, "history": [["the fox", "jumps"]]},
        lambda: [chat(*TURNS[:2], ("user", "the fox\na dog"), ("assistant", "over"))],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_and_labels(name):
    row, expected = CASES[name]
    values = {"input": ["unused"], "tokenizer": tiny_tokenizer_folder(), "output_prefix": "unused"}
    config = PreprocessConfig.model_validate(values | {"handler": name.split(",")[0]}, strict=False)
    document = build_handler(config, tiny_tokenizer()).encode(row)
    keys = ("text", None) if "text" in document.sequences else ("input_ids", "labels")
    found = document.sequences
    for i, (ids, labels) in enumerate(expected()):
        assert list(found[keys[0]][i]) == ids
        if labels is not None:
            assert found["labels"][i] == labels
            assert found["attention_mask"][i] == [1] * len(ids)
    assert len(found[keys[0]]) == len(expected())


def test_every_handler_has_a_case():
    elsewhere = {"preference", "feedback"}  # test_preference_data.py
    assert HANDLERS.keys() - elsewhere == {name.split(",")[0] for name in CASES}
