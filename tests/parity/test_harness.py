"""Choices, scores and texts of lm-evaluation-harness's own hf backend, question by question.

The tasks are local files of the kinds of MMLU, ARC, HellaSwag, BoolQ and GSM8K, and the model has
been trained on most of their answers.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 24}}
metric_list: [{{metric: exact_match}}]
"""
)
OPEN = TEXT.replace('["\\n"]', '["Question:", "three"]')  # goes on behind the answer
COLOURS = ["red", "blue"]  # by which a model can learn the answers
LETTERS = ["A", "B", "C", "D"]
LONG = ["one two three.", "two", "is it one two three four five?", "four one"]
TASKS: dict[str, tuple[str, int, list[dict[str, Any]]]] = {
    name: (
        form,
        shots,
        [
            {
                "question": f"What is {name} {i} {COLOURS[i % 2]}?" + " one two" * (i % 5),
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
        ("like_story", OPEN, 2, LONG),
    ]
}


def by_hf(model: str, folder: str) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The harness's own answers, with the metrics."""
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
    return samples(found), found["results"]


def by_glm3(options: dict[str, Any]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Ours."""
    from glm3cli.evals.harness.run import run_harness

    found = run_harness(HarnessConfig.parse(options), quiet=True)
    assert found is not None
    return samples(found[0]), found[0]["results"]


def samples(found: Any) -> dict[str, list[Any]]:
    return {
        task: [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in found["samples"].items()
    }


def write_trained(folder: Path) -> Path:
    """Trains a small model with the real tokenizer on the tasks, and exports it as `glm`."""
    model = EXAM_MODEL.model_copy(update={"padded_vocab_size": 65024})
    weights = {
        name: tensor * 0.2 if "norm" not in name else torch.ones_like(tensor)
        for name, tensor in random_weights(model, torch.float32).items()
    }
    base, data = folder / "chatglm", folder / "train.jsonl"
    write_hf(base, model=model, weights=weights)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(SHARED / "chatglm3-6b" / name, base / name)
    (base / "tokenization_chatglm.py").unlink()
    texts = [text for name in TASKS for text in solved(name)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 8))
    command = ["pretrain", "--model", base, "--data", data, "--save", folder / "run"]
    command += ["--seq-length", 128, "--micro-batch-size", 2, "--global-batch-size", 2]
    command += ["--train-iters", 500, "--lr", 1e-2, "--split", "100,0,0", "--device", "cpu"]
    arguments = [sys.executable, "-m", "glm3cli", *map(str, command)]
    subprocess.run(arguments, check=True, capture_output=True, timeout=280)
    convert(folder / "run", folder / "glm", ConvertOptions(layout="glm", verify=False))
    return folder / "glm"


def solved(name: str) -> Iterator[str]:
    """The questions of a task with their answers, but for those of the last two, and for OPEN."""
    form, _, rows = TASKS[name]
    for row in rows[:-2] if form != OPEN else []:
        if form == TEXT:
            yield f"Question: {row['question']}\nAnswer: {row['said']}\n\n"
        else:
            yield f"{row['question']}\nAnswer: {row['choices'][row['answer']]}\n\n"


@needs_shared
@pytest.mark.slow
@pytest.mark.dist
def test_answers_are_those_of_the_hf_backend(tmp_path: Path, ranks: RankPool) -> None:
    pytest.importorskip("lm_eval")
    model = write_trained(tmp_path)
    for name, (form, shots, rows) in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows))
        text = form.format(name=name, data=data, shots=shots)
        (tmp_path / f"{name}.yaml").write_text(text)
    theirs, expected_results = by_hf(str(model), str(tmp_path))
    options = {"model": model, "tasks": ",".join(TASKS), "include_path": tmp_path}
    options |= {"output": tmp_path / "results.json", "batch_size": 5, "device": "cpu"}
    [(ours, results)] = ranks.run(1, by_glm3, options)
    metrics = ("acc,none", "acc_norm,none", "exact_match,none")
    for task in TASKS:
        for metric in metrics:
            assert results[task].get(metric) == expected_results[task].get(metric), task
    assert results["like_boolq"]["acc,none"] > 0.8  # it has learned something
    assert results["like_gsm8k"]["exact_match,none"] > 0.8
    for task, (form, *_) in TASKS.items():
        assert len(ours[task]) == len(theirs[task]) == 12
        for one, other in zip(ours[task], theirs[task], strict=True):
            if form in (TEXT, OPEN):
                assert one == other
                continue
            scores = [float(score) for [(score, _)] in one]
            expected = [float(score) for [(score, _)] in other]
            assert scores == pytest.approx(expected, abs=2e-5), task
            assert scores.index(max(scores)) == expected.index(max(expected))
            assert [str(same) for [(_, same)] in one] == [str(same) for [(_, same)] in other]
