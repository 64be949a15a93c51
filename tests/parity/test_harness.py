"""Choices, scores and texts of lm-evaluation-harness's own hf backend, question by question.

The tasks are local files of the kinds of MMLU, ARC, HellaSwag, BoolQ and GSM8K.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.evaluation import HarnessConfig
from tests.support.checkpoints import random_weights, write_hf
from tests.support.exam import EXAM_MODEL
from tests.support.ranks import RankPool
from tests.support.shared import SHARED, needs_shared

HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
num_fewshot: {shots}
"""
CHOICE = (
    HEAD
    + """output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
)
TEXT = (
    HEAD
    + """output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: said
generation_kwargs: {{until: ["Question:", "three"], do_sample: false, max_gen_toks: 24}}
metric_list: [{{metric: exact_match}}]
"""
)
LETTERS = ["A", "B", "C", "D"]
LONG = ["one two three.", "two", "is it one two three four five?", "four one"]
TASKS: dict[str, tuple[str, int, list[dict[str, Any]]]] = {
    name: (
        form,
        shots,
        [
            {
                "question": f"What is {name} {i}?" + " one two" * (i % 5),
                "choices": choices[: 2 + i % 3] if name == "like_arc" else choices,
                "answer": i % 2,
                "said": "one",
            }
            for i in range(12)
        ],
    )
    for name, form, shots, choices in [
        ("like_mmlu", CHOICE, 3, LETTERS),
        ("like_arc", CHOICE, 0, LONG),
        ("like_hellaswag", CHOICE, 0, [f"{one} five" for one in LONG]),
        ("like_boolq", CHOICE, 0, ["no", "yes"]),
        ("like_gsm8k", TEXT, 2, LONG),
    ]
}


def by_hf(model: str, folder: str) -> dict[str, list[Any]]:
    """The harness's own answers."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf",
        {"pretrained": model, "dtype": "float32", "device": "cpu"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    assert found is not None
    return samples(found)


def by_glm3(options: dict[str, Any]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Ours, with the metrics."""
    from glm3cli.evals.harness.run import run_harness

    found = run_harness(HarnessConfig.parse(options), quiet=True)
    assert found is not None
    return samples(found[0]), found[0]["results"]


def samples(found: Any) -> dict[str, list[Any]]:
    return {
        task: [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in found["samples"].items()
    }


@needs_shared
@pytest.mark.slow
@pytest.mark.dist
def test_answers_are_those_of_the_hf_backend(
    tmp_path: Path, ranks: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    model = EXAM_MODEL.model_copy(update={"padded_vocab_size": 65024})
    weights = {
        name: tensor if tensor.dim() == 1 else tensor * 0.2
        for name, tensor in random_weights(model, torch.float32).items()
    }
    write_hf(tmp_path / "chatglm", model=model, weights=weights)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(SHARED / "chatglm3-6b" / name, tmp_path / "chatglm" / name)
    (tmp_path / "chatglm" / "tokenization_chatglm.py").unlink()
    convert(tmp_path / "chatglm", tmp_path / "glm", ConvertOptions(layout="glm", verify=False))
    for name, (form, shots, rows) in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows))
        text = form.format(name=name, data=data, shots=shots)
        (tmp_path / f"{name}.yaml").write_text(text)
    theirs = by_hf(str(tmp_path / "glm"), str(tmp_path))
    options = {"model": tmp_path / "glm", "tasks": ",".join(TASKS), "include_path": tmp_path}
    options |= {"output": tmp_path / "results.json", "batch_size": 5, "device": "cpu"}
    [(ours, results)] = ranks.run(1, by_glm3, options)
    assert results["like_mmlu"]["acc,none"] <= 1
    for task in TASKS:
        assert len(ours[task]) == len(theirs[task]) == 12
        for one, other in zip(ours[task], theirs[task], strict=True):
            if task == "like_gsm8k":
                assert one == other
                continue
            scores = [float(score) for [(score, _)] in one]
            expected = [float(score) for [(score, _)] in other]
            assert scores == pytest.approx(expected, abs=2e-5), task
            assert scores.index(max(scores)) == expected.index(max(expected))
            assert [str(same) for [(_, same)] in one] == [str(same) for [(_, same)] in other]
