"""lm-evaluation-harness scores a server as it scores the model that `glm3 eval harness` opens."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from glm3cli.checkpoint.convert.random_model import write_random_model
from glm3cli.checkpoint.random import RandomSource
from glm3cli.demo import content
from tests.support.ranks import RankPool
from tests.support.server import Asking, serve_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: ["a lake", "a hill", "A", "B"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "text": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
}
WORDS = ["Who", "What", "When", "Where", "Why", "grass", "snow", "wind"]
NAMES = [f"toy_{kind}" for kind in TASKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("harness")
    content.train_tokenizer(folder / "tokenizer")
    shape = content.MODEL.model_copy(update={"seq_length": 2048})
    source = RandomSource(shape, seed=1, std=0.2)
    write_random_model(folder / "model", source, folder / "tokenizer")
    rows = [
        {"question": f"{WORDS[number]} 湖?", "answer": number % 4, "said": "one"}
        for number in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for kind, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}"
        head = f"task: toy_{kind}\n{data}\ntest_split: test\nnum_fewshot: 0"
        (folder / f"tasks/{kind}.yaml").write_text(head + text)
    return folder


def offline(folder: Path) -> None:
    os.environ |= {"HF_HOME": str(folder), "HF_DATASETS_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}


def by_the_program(folder: Path) -> Any:
    """Runs on a rank: what `glm3 eval harness` finds."""
    offline(folder)
    from glm3cli.config.evaluation import HarnessConfig
    from glm3cli.evals.harness.run import run_harness

    given = {
        "model": folder / "model",
        "include_path": folder / "tasks",
        "tasks": ",".join(NAMES),
        "output": folder / "results.json",
        "device": "cpu",
    }
    found = run_harness(HarnessConfig.parse(given), quiet=True)
    assert found is not None
    return answers(found[0]["samples"])


def by_the_server(ask: Asking) -> Any:
    """Runs beside a server: what lm-evaluation-harness finds by asking it."""
    folder = ask.folder
    offline(folder)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    url = f"{ask.url}/v1/completions"
    found = simple_evaluate(
        model="local-completions",
        model_args=f"model={ask.model},base_url={url},num_concurrent=2,max_retries=1,batch_size=3",
        tasks=manager.match_tasks(NAMES),
        task_manager=manager,
    )
    assert found is not None
    return answers(found["samples"])


def answers(samples: dict[str, Any]) -> dict[str, list[Any]]:
    """The answer to each question, in the order of the questions."""
    return {
        name: [one["filtered_resps"] for one in sorted(found, key=lambda one: one["doc_id"])]
        for name, found in samples.items()
    }


def choice(scores: list[Any]) -> int:
    return max(range(len(scores)), key=lambda index: scores[index][0])


@pytest.mark.filterwarnings("ignore")
def test_the_server_is_scored_as_the_model_is(ranks: RankPool, folder: Path) -> None:
    [ours] = ranks.run(1, by_the_program, folder)
    served, _ = ranks.run(2, serve_for, by_the_server, folder / "model", {"pp": 2})
    assert [t[0].strip() for t in served["toy_text"]] == [t[0].strip() for t in ours["toy_text"]]
    for one, other in zip(served["toy_choice"], ours["toy_choice"], strict=True):
        assert [a[1] for a in one] == [b[1] for b in other]
        assert [a[0] for a in one] == pytest.approx([b[0] for b in other], abs=1e-4)
        assert choice(one) == choice(other)
    assert len({round(a[0], 3) for one in served["toy_choice"] for a in one}) > 20
    pairs = zip(served["toy_rolling"], ours["toy_rolling"], strict=True)
    assert all(float(one[0]) == pytest.approx(float(other[0]), abs=1e-3) for one, other in pairs)
