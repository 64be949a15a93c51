"""lm-evaluation-harness drives an engine, without a network: the task is a local YAML file."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm3cli.config.evaluation import HarnessConfig
from glm3cli.data.tokens.chat import Message, build_prompt
from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.harness import run as harness
from glm3cli.evals.harness.code import CodeEval, check_can_run, passes
from glm3cli.evals.page.harness import write_harness
from tests.support.exam import FakeEngine, FakeModel, exam_tokenizer, score, write_exam_model
from tests.support.ranks import RankPool
from tests.support.report_page import read_page

CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer:"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
TEXT = """
task: toy_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 20}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: toy_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
ROWS = [
    {"question": f"What is {i}?", "answer": i % 4, "said": "one" if i % 2 else "two"}
    for i in range(6)
]


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError) as error:
        harness.check_installed()
    assert error.value.hint == "pip install 'glm3[eval]'"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    pytest.importorskip("lm_eval")
    engine = FakeEngine(exam_tokenizer())
    engine.script = exam_tokenizer().encode("one\ntwo")

    load = SimpleNamespace(open_model=lambda _config: FakeModel(engine))
    monkeypatch.setitem(sys.modules, "glm3cli.infer.load", load)
    monkeypatch.setattr(harness, "check_model", lambda _config: None)
    return engine


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("text", TEXT), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def _config(folder: Path, **more: Any) -> HarnessConfig:
    options = {"model": folder, "include_path": folder, "output": folder.parent / "results.json"}
    return HarnessConfig.parse(options | more)


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_all_three_kinds(engine: FakeEngine, tasks: Path) -> None:
    config = _config(tasks, tasks="toy_choice,toy_[rt]*", batch_size=3)
    found = harness.run_harness(config, quiet=True)
    assert found is not None
    result, table = found
    assert json.loads(config.output.read_text()) == result
    assert result["benchmark"] == "harness"
    assert result["is_score"]
    assert result["versions"].keys() >= {"lm-eval", "torch"}
    assert "toy_choice" in table

    tokenizer = exam_tokenizer()
    right = 0
    for row in ROWS:
        prompt = [*tokenizer.prefix, *tokenizer.encode(f"{row['question']} Answer:")]
        scores = [score(prompt, tokenizer.encode(f"Answer: {x}")[-1]) for x in "ABCD"]
        right += scores.index(max(scores)) == row["answer"]
    assert result["results"]["toy_choice"]["acc,none"] == right / 6
    assert result["results"]["toy_text"]["exact_match,none"] == 0.5
    assert result["results"]["toy_rolling"]["bits_per_byte,none"] > 0
    assert len(result["samples"]["toy_choice"]) == 6
    assert all(
        list(prompt[:2]) == list(tokenizer.prefix) for batch in engine.batches for prompt in batch
    )


@pytest.mark.filterwarnings("ignore")
def test_limit_is_marked_as_no_score(engine: FakeEngine, tasks: Path) -> None:
    found = harness.run_harness(_config(tasks, tasks="toy_text", limit=2), quiet=True)
    assert found is not None
    result, _ = found
    assert not result["is_score"]
    assert result["n-samples"]["toy_text"]["effective"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_unknown_task_names_its_neighbour(engine: FakeEngine, tasks: Path) -> None:
    with pytest.raises(ConfigError) as error:
        harness.run_harness(_config(tasks, tasks="toy_choise,gsm8k"), quiet=True)
    assert error.value.message == (
        "lm-evaluation-harness has no task 'toy_choise' (did you mean 'toy_choice'?)"
    )


@pytest.mark.filterwarnings("ignore")
def test_chats_caches_and_pages(engine: FakeEngine, tasks: Path) -> None:
    options = {"tasks": "toy_choice,toy_text", "chat_template": True, "system": "Be brief."}
    config = _config(tasks, **options, use_cache=tasks / "cache" / "answers")
    found = harness.run_harness(config, quiet=True)
    assert found is not None
    tokenizer = exam_tokenizer()
    turns = [Message("system", "Be brief."), Message("user", "What is 0?")]
    prompt = [*build_prompt(tokenizer, turns), *tokenizer.encode("\n")]
    assert tuple(prompt) in [one for batch in engine.batches for one in batch]
    page = read_page(config.output.with_suffix(".html"))
    assert "toy_choice, acc" in page.text
    choice, text = page.questions[0], page.questions[-1]
    assert [one.strip() for one in choice["choices"]] == list("ABCD")
    assert (choice["answer"], sum(choice["shares"])) == ("A", pytest.approx(1, abs=1e-3))
    assert choice["choice"] == "ABCD"[choice["shares"].index(max(choice["shares"]))]
    assert (text["subject"], text["choice"], text["answer"]) == ("toy_text", "one", "one")
    engine.batches.clear()
    again = harness.run_harness(config, quiet=True)
    assert again is not None
    assert engine.batches == []  # every answer was kept
    assert again[0]["results"] == found[0]["results"]
    without = harness.run_harness(_config(tasks, **options, log_samples=False), quiet=True)
    assert without is not None
    assert "samples" not in without[0]


@pytest.mark.parametrize(("target", "answer"), [(1, "B"), ("no", "B"), (-100, "-100"), (7, "7")])
def test_a_page_shows_targets_of_any_form(tmp_path: Path, target: Any, answer: str) -> None:
    sample = {
        "doc_id": 0,
        "acc": 1.0,
        "arguments": [("Is it?", " yes"), ("Is it?", " no")],
        "filtered_resps": [(-2.0, False), (-1.0, True)],
        "target": target,
    }
    result = {"results": {}, "settings": {}, "versions": {}, "is_score": True}
    write_harness(tmp_path / "x.json", result | {"samples": {"task": [sample]}})
    [row] = read_page(tmp_path / "x.html").questions
    assert (row["text"], row["choice"], row["answer"]) == ("Is it?", "B", answer)
    assert row["shares"] == [0.2689, 0.7311]


PUBLISHED = {
    "BoolQ/dev.jsonl": [{"question": "is it", "passage": "It is.", "answer": True}],
    "hellaswag/hellaswag_val.jsonl": [
        {
            "ind": 1,
            "activity_label": "Art",
            "ctx_a": "One.",
            "ctx_b": "he",
            "ctx": "One. he",
            "endings": ["one.", "two.", "three.", "four."],
            "label": 2,
        }
    ],
    "ARC-V1/ARC-Easy/ARC-Easy-Test.jsonl": [
        {
            "id": "x",
            "question": {
                "stem": "What?",
                "choices": [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}],
            },
            "answerKey": "B",
        }
    ],
    "gsm8k/test.jsonl": [{"question": "1+1?", "answer": "It is #### 2"}],
    "gsm8k/train.jsonl": [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)],
    "AGIEval/data/v1/sat-en.jsonl": [
        {
            "passage": "P. ",
            "question": "Q?",
            "options": ["(A)one", "(B)two"],
            "label": "B",
            "answer": None,
        }
    ],
    "AGIEval/data/v1/gaokao-mathcloze.jsonl": [
        {"passage": None, "question": "几?", "options": None, "label": None, "answer": "2"}
    ],
    "bbh/boolean_expressions.json": {"examples": [{"input": "not True is", "target": "False"}]},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tasks_read_the_files_of_their_authors(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, rows in PUBLISHED.items():
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in rows]
        file.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(lines))
    human = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
    }
    with gzip.open(tmp_path / "data" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(human))
    engine.script = exam_tokenizer().encode("one")
    names = "boolq,hellaswag,arc_easy,gsm8k,agieval_sat_en,agieval_gaokao_mathcloze"
    options = {"model": tmp_path, "data_dir": tmp_path / "data", "output": tmp_path / "r.json"}
    tasks = f"{names},bbh_zeroshot_boolean_expressions,humaneval"
    with pytest.raises(ConfigError, match="runs code that the model writes"):
        harness.run_harness(HarnessConfig.parse(options | {"tasks": tasks}), quiet=True)
    config = HarnessConfig.parse(options | {"tasks": tasks, "run_code": True})
    found = harness.run_harness(config, quiet=True)
    assert found is not None
    result = found[0]
    assert len(result["results"]) == 8
    asked = {task: rows[0]["arguments"][0][0] for task, rows in result["samples"].items()}
    assert asked["boolq"] == "It is.\nQuestion: is it?\nAnswer:"
    assert asked["hellaswag"] == "Art: One. He"
    assert asked["arc_easy"] == "Question: What?\nAnswer:"
    assert asked["gsm8k"].count("Question:") == 6
    assert asked["agieval_sat_en"] == (
        "P. Q: Q? Answer Choices: (A)one (B)two\nA: Among A through B, the answer is"
    )
    assert asked["agieval_gaokao_mathcloze"] == "问题：几?\n答案："
    assert asked["bbh_zeroshot_boolean_expressions"].endswith("Q: not True is\nA:")
    assert {name: rows[0]["doc"].get("label") for name, rows in result["samples"].items()}[
        "boolq"
    ] == 1
    assert result["results"]["humaneval"]["pass@1,create_test"] == 0.0
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"test\.jsonl is no JSON"):
        harness.run_harness(HarnessConfig.parse(options | {"tasks": "gsm8k"}), quiet=True)
    empty = options | {"tasks": "hellaswag", "data_dir": tmp_path / "data" / "bbh"}
    with pytest.raises(DataError, match="has no files of hellaswag"):
        harness.run_harness(HarnessConfig.parse(empty), quiet=True)
    shots = options | {"tasks": "boolq", "num_fewshot": 2}
    with pytest.raises(DataError, match="has no solved examples of the task boolq"):
        harness.run_harness(HarnessConfig.parse(shots), quiet=True)


def test_code_is_run_with_limits_and_without_a_network(tmp_path: Path) -> None:
    check_can_run()
    kept = tmp_path / "kept"
    programs = {
        "assert 1 + 1 == 2": True,
        "import subprocess; subprocess.run(['true'], check=True)": True,
        f"open({str(kept)!r}, 'w').write('x' * 2**25)": False,
        "assert False": False,
        "import sys; sys.exit(3)": False,
        "import socket; socket.create_connection(('127.0.0.1', 9))": False,
        "import ctypes; assert ctypes.CDLL(None).syscall(425, 1, 0) >= 0": False,  # io_uring
        "x = 'x' * 2**31": False,
        "def f(:": False,
    }
    assert {program: passes(program) for program in programs} == programs
    rates, passed = CodeEval().compute(
        ["assert f(1) == 2", "assert f(1) == 3"],
        [["def f(x): return x + 1", "def f(x): return 3"]] * 2,
        k=[1, 2, 3],
    )
    assert passed == {0: [True, False], 1: [False, True]}
    assert rates == {"pass@1": 0.5, "pass@2": 1.0}


def run_tasks(options: dict[str, Any]) -> Any:
    """A run on this rank, for the pool of ranks."""
    found = harness.run_harness(HarnessConfig.parse(options), quiet=True)
    return None if found is None else found[0]


@pytest.mark.dist
def test_all_parallel_sizes_give_the_same_answers(
    tasks: Path, tmp_path: Path, ranks: RankPool
) -> None:
    pytest.importorskip("lm_eval")
    names = "toy_choice,toy_text,toy_rolling"
    model = write_exam_model(tmp_path / "model")
    base = _config(tasks, tasks=names, model=model, batch_size=2, device="cpu").model_dump()
    alone = ranks.run(1, run_tasks, base)[0]
    for sizes in ({}, {"tp": 2}, {"pp": 2}):
        first, second = ranks.run(2, run_tasks, base | sizes)
        assert second is None
        for task, metrics in alone["results"].items():
            numbers = {k: v for k, v in metrics.items() if not isinstance(v, str)}
            found = {name: first["results"][task][name] for name in numbers}
            assert found == pytest.approx(numbers, rel=1e-4)
        said = [[row["resps"] for row in one["samples"]["toy_text"]] for one in (first, alone)]
        assert said[0] == said[1]
