"""lm-evaluation-harness drives an engine, without a network: the task is a local YAML file."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm3cli.config.evaluation import HarnessConfig
from glm3cli.errors import ConfigError
from glm3cli.evals.harness import run as harness
from tests.support.exam import FakeEngine, FakeModel, exam_tokenizer, score, write_exam_model
from tests.support.ranks import RankPool

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
