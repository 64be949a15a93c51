"""Questions of one's own: rows, choices of any number, exact answers, rotations, and the page."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm3cli.config.evaluation import CustomConfig, MmluConfig
from glm3cli.data.tokens.chat import begin_turn
from glm3cli.data.tokens.messages import Message
from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.custom import run_custom
from glm3cli.evals.exact import ExactRule
from glm3cli.evals.results import EvalResult
from tests.support.exam import (
    FakeEngine,
    FakeModel,
    exam_tokenizer,
    run,
    score,
    write_csv,
    write_exam,
)
from tests.support.report_page import read_page

TOKENIZER = exam_tokenizer()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine(TOKENIZER)
    monkeypatch.setattr("glm3cli.evals.runner.open_here", lambda _config: FakeModel(engine))
    return engine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def _ask(model: Path, rows: list[Any], **more: Any) -> EvalResult:
    file = model.parent / "own.jsonl"
    file.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows))
    output = model.parent / "results.json"
    options = {"model": model, "file": file, "output": output, "device": "cpu"}
    found = run_custom(CustomConfig.parse(options | more))
    assert found is not None
    assert json.loads(output.read_text()) == json.loads(json.dumps(found[0]))
    return found[0]


def test_choices_of_any_number(engine: FakeEngine, model: Path) -> None:
    rows = [
        {"question": "one?", "choices": ["x", "y"], "answer": "y", "category": "short"},
        {"question": "two?", "choices": ["x", "y", "z"], "answer": 2, "subject": "many"},
        {"question": "<three>?", "choices": ["x", "y", "z"], "answer": "A", "subject": "many"},
    ]
    result = _ask(model, rows, header="What is it?\\n")
    assert [len(one["scores"]) for one in result["questions"]] == [2, 3, 3]
    assert [one["answer"] for one in result["questions"]] == ["B", "C", "A"]
    assert [(one["subject"], one["index"]) for one in result["questions"]] == [
        ("all", 0),
        ("many", 0),
        ("many", 1),
    ]
    assert (result["benchmark"], list(result["categories"])) == ("own", ["short", "all"])
    text = "What is it?\none?\nA. x\nB. y\nAnswer:"
    prompt = [*TOKENIZER.prefix, *TOKENIZER.encode(text)]
    letters = [TOKENIZER.encode(f"Answer: {letter}")[-1] for letter in "AB"]
    assert result["questions"][0]["scores"] == [score(prompt, token) for token in letters]
    page = read_page(model.parent / "results.html")
    assert "own, logits protocol, 0-shot" in page.text
    assert not [tag for tag, values in page.tags if "src" in values or "href" in values]


def test_exact_answers(engine: FakeEngine, model: Path) -> None:
    engine.script = TOKENIZER.encode("  one  two\nthree")
    rows = [
        {"question": "a?", "answer": "one two"},
        {"question": "b?", "answer": ["zwei", "One  two"]},
        {"question": "c?", "answer": 3},
    ]
    result = _ask(model, rows, max_new_tokens=50)
    assert [one["is_right"] for one in result["questions"]] == [True, False, False]
    assert [one["choice"] for one in result["questions"]] == ["one two"] * 3
    assert result["protocol"] == "exact"
    assert _ask(model, rows, ignore_case=True)["micro"] == 2 / 3
    found = _ask(model, rows, answer_pattern=r"(t\w+)", stop=["zzz"])
    assert [one["choice"] for one in found["questions"]] == ["three"] * 3
    assert _ask(model, rows, answer_pattern="(x)")["unparsed"] == 3


def test_options_in_the_forms_of_common_data_sets(
    engine: FakeEngine, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each form asks the same prompts as `choices`, and a column that isn't read is named once."""
    plain = [
        {"question": "one?", "choices": ["x", "y"], "answer": "B"},
        {"question": "It rains.\ntwo?", "choices": ["1", "2", "3"], "answer": "C"},
    ]
    wanted = _ask(model, plain)
    arc = {"text": ["1", "2", "3"], "label": ["1", "2", "3"]}
    forms: list[list[dict[str, Any]]] = [
        [
            {"question": "one?", "A": "x", "B": "y", "C": None, "answer": "B", "id": 3},
            {"Question": "It rains.\ntwo?", "A": "1", "B": "2", "C": "3", "Answer": "C"},
        ],
        [
            {"question": "one?", "options": ["x", "y"], "answer_index": 1, "hint": "y", "m": 1},
            {"question": "two?", "context": "It rains.", "options": arc, "answer": "3", "m": 2},
        ],
        [
            {"question": "one?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
            | {"answerKey": "B"},
            {"question": "two?", "passage": "It rains.", "choices": arc, "answerKey": 3},
        ],
    ]
    for rows in forms:
        found = _ask(model, rows)
        assert found["questions"] == wanted["questions"]
        assert found["prompt_sha256"] == wanted["prompt_sha256"]
    file = model.parent / "own.jsonl"
    assert caplog.messages == [f"{file}: what is in hint, m is no part of the questions"]


def test_tables_are_read_as_lines_are(engine: FakeEngine, model: Path) -> None:
    rows = [{"question": f"{n}?", "choices": ["x", "y"], "answer": n} for n in range(2)]
    wanted = _ask(model, rows)
    pq.write_table(pa.Table.from_pylist(rows), model.parent / "t.parquet")
    cells = [("Question", "A", "B", "Answer"), ("0?", "x", "y", "A"), ("1?", "x", "y", "B")]
    write_csv(model.parent / "t.csv", cells)
    for name in ("t.parquet", "t.csv"):
        found = _ask(model, rows, file=model.parent / name)
        assert found["questions"] == wanted["questions"]
        assert found["prompt_sha256"] == wanted["prompt_sha256"]
    broken = model.parent / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"broken\.parquet"):
        _ask(model, rows, file=broken)


def test_half_a_surrogate_pair_is_a_replaced_character(engine: FakeEngine, model: Path) -> None:
    """As in training's data: what UTF-8 can't hold ends no run when its result is written."""
    half = '{"question": "a \\ud83d", "choices": ["x", "y \\udc00"], "answer": 0}'
    found = _ask(model, [half])
    whole = {"question": "a \ufffd", "choices": ["x", "y \ufffd"], "answer": 0}
    assert found["questions"] == _ask(model, [whole])["questions"]
    assert "a \ufffd" in str(read_page(model.parent / "results.html").questions)
    engine.script = TOKENIZER.encode("one")
    found = _ask(model, ['{"question": "a", "answer": ["\\ud83d x", "one"]}'])
    assert [one["answer"] for one in found["questions"]] == ["\ufffd x"]


def test_the_last_match_holds_the_answer() -> None:
    rule = ExactRule(9, pattern=r"is (\d+)")
    assert rule.answer_in("it is 4, no, is 5.") == "5"
    assert rule.answer_in("nothing") is None
    assert not rule.is_right(None, ["None"])


def test_shots_come_from_a_file_of_their_own(engine: FakeEngine, model: Path) -> None:
    shots = model.parent / "shots.jsonl"
    shots.write_text('{"question": "s?", "choices": ["p", "q"], "answer": "B"}\n')
    rows = [{"question": "one?", "choices": ["x", "y"], "answer": 0}]
    _ask(model, rows, shots=1, shots_file=shots)
    text = "s?\nA. p\nB. q\nAnswer: B\n\none?\nA. x\nB. y\nAnswer:"
    assert engine.batches == [[(*TOKENIZER.prefix, *TOKENIZER.encode(text))]]
    with pytest.raises(ConfigError, match="--shots 2, but"):
        _ask(model, rows, shots=2, shots_file=shots)
    with pytest.raises(ConfigError, match="--shots goes with --shots-file"):
        _ask(model, rows, shots=1)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "own.jsonl:1 is not JSON"),
        ('{"z": ' + "[" * 90_000, "own.jsonl:1 is not JSON: it is nested too deeply"),
        ("[]", "own.jsonl:1 is no JSON object"),
        ({"answer": "x"}, "own.jsonl:1: question is None"),
        ({"question": "a", "choices": ["x"], "answer": 0}, "choices is"),
        ({"question": "a", "choices": ["x", "y"], "answer": "C"}, "answer is 'C'"),
        ({"question": "a", "choices": ["x", "y"], "answer": 2}, "answer is 2"),
        ({"question": "a", "choices": ["x", "y"], "answer": True}, "answer is True"),
        ({"question": "a", "A": "x", "C": "y", "answer": "A"}, "A, C is all that there is"),
        ({"question": "a", "A": "x", "choices": ["x", "y"], "answer": 0}, "in choices, A"),
        ({"question": "a", "choices": {"text": ["x", "y"], "label": ["A"]}}, "choices is {"),
        ({"question": "a", "answer": None}, "answer is None"),
        ({"question": "a", "answer": []}, "answer is"),
        ("", "has no questions"),
    ],
)
def test_wrong_rows_are_named(engine: FakeEngine, model: Path, row: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        _ask(model, [row])


def test_a_file_has_one_kind_of_questions(engine: FakeEngine, model: Path) -> None:
    rows = [{"question": "a", "answer": "x"}, {"question": "b", "choices": ["x", "y"], "answer": 0}]
    with pytest.raises(DataError, match=r"own\.jsonl:2 is a question with choices"):
        _ask(model, rows)
    with pytest.raises(ConfigError, match="have no choices"):
        _ask(model, rows[:1], rotate_choices=True)


def test_rotated_options_are_asked_at_all_places(engine: FakeEngine, model: Path) -> None:
    rows = [{"question": "a", "choices": ["x", "y", "z"], "answer": "B"}]
    plain = _ask(model, rows)
    result = _ask(model, rows, rotate_choices=True)
    assert result["questions"] == plain["questions"]
    assert (result["micro"], result["prompt_sha256"]) == (plain["micro"], plain["prompt_sha256"])
    found = result["rotated_questions"]
    assert [(one["rotation"], one["answer"]) for one in found] == [(1, "A"), (2, "C")]
    asked = [list(prompt) for prompt in engine.batches[-1]]
    text = "a\nA. y\nB. z\nC. x\nAnswer:"
    assert [*TOKENIZER.prefix, *TOKENIZER.encode(text)] in asked
    rotations = result["rotations"]
    assert len(rotations["accuracies"]) == 3
    picks = [(one["choice"], one.get("rotation", 0)) for one in (*result["questions"], *found)]
    options = {("ABC".index(letter) + places) % 3 for letter, places in picks}
    assert rotations["consistent"] == (len(options) == 1)
    assert rotations["always_right"] == (options == {1})


def test_a_chat_is_asked_by_turns(engine: FakeEngine, model: Path, tmp_path: Path) -> None:
    options = {"model": model, "data_dir": write_exam(tmp_path / "exam", {"law": 1})}
    options |= {"output": tmp_path / "chat.json", "shots": 1, "chat_template": True}
    result = run(MmluConfig.parse(options))
    header = "The following are multiple choice questions (with answers) about law.\n\n"
    choices = "\nA. one\nB. None\nC. NA\nD. 0"
    turns = [
        Message("user", f"{header}What is law dev 0?{choices}"),
        Message("assistant", "Answer: A"),
        Message("user", f"What is law test 0?{choices}"),
        Message("assistant", "Answer:"),
    ]
    assert engine.batches == [[tuple(begin_turn(TOKENIZER, turns))]]
    plain = run(MmluConfig.parse(options | {"chat_template": False}))
    assert plain["prompt_sha256"] != result["prompt_sha256"]


def test_a_folder_may_have_more_options(engine: FakeEngine, model: Path, tmp_path: Path) -> None:
    row = ("q?", "a", "b", "c", "d", "e", "f", "F")
    write_csv(tmp_path / "exam" / "test" / "x_test.csv", [row])
    options = {"model": model, "data_dir": tmp_path / "exam", "output": tmp_path / "o.json"}
    [question] = run(MmluConfig.parse(options | {"shots": 0}))["questions"]
    assert (len(question["scores"]), question["answer"]) == (6, "F")
