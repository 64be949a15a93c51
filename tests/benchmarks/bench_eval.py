"""How fast evaluation is, beside lm-evaluation-harness's hf backend, in whole commands on a CPU.

    python -m tests.benchmarks.bench_eval --tokenizer DIR --mmlu DIR --rounds 3

makes a random model with ChatGLM3's vocabulary (8 layers, hidden size 512, fp32), asks it 200
questions of 10 subjects of MMLU, 5-shot, by `glm3 eval mmlu` and by the harness at several batch
sizes, which take turns, and compares the choices of every question. `--part generation` has both
answer questions as GSM8K asks them, `--part ranks` compares two data parallel ranks of one thread
with one, and `--part full` asks all 14,042 questions of a model of 35 million parameters, and shows
how much of the time the forward passes take. Times are medians, with the start of each command; the
seconds of CPU beside them say more where other programs run, too.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from glm3cli.config.model import ModelConfig
from glm3cli.evals.questions import read_subjects
from glm3cli.evals.suites.mmlu import MMLU
from tests.benchmarks.bench_generate import SMALL

SHAPES = {
    "small": SMALL,
    "35M": SMALL
    | {
        "num_layers": 6,
        "hidden_size": 256,
        "ffn_hidden_size": 688,
        "num_attention_heads": 8,
        "kv_channels": 32,
    },
}
SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "college_biology",
    "computer_security",
    "econometrics",
    "global_facts",
    "management",
    "philosophy",
)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 0
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: [" A", " B", " C", " D"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = """output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: ["Question:", "</s>"], do_sample: false, max_gen_toks: 64}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_model(folder: Path, shape: dict[str, Any], tokenizer: Path) -> Path:
    """Writes a random model in the layout `glm`, which both programs read."""
    from glm3cli.checkpoint.convert.convert import convert
    from glm3cli.checkpoint.names import slots
    from glm3cli.checkpoint.random import RandomSource
    from glm3cli.config.convert import ConvertOptions
    from tests.support.checkpoints import write_hf

    model = ModelConfig(**shape)
    source = RandomSource(model, seed=1, std=0.05)
    weights = {
        weight.name("chatglm", layer): source.read(weight, layer).clone()
        for weight, layer in slots(model)
    }
    write_hf(folder / "chatglm", model=model, weights=weights)
    (folder / "chatglm" / "tokenization_chatglm.py").unlink()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / "chatglm" / name).write_bytes((tokenizer / name).read_bytes())
    convert(folder / "chatglm", folder / "glm", ConvertOptions(layout="glm", verify=False))
    return folder / "glm"


def write_tasks(folder: Path, mmlu: Path, limit: int) -> Path:
    """Writes the questions as local tasks of the harness."""
    folder.mkdir()
    subjects = read_subjects(MMLU, mmlu, SUBJECTS, 5, limit)
    rows = [
        {"prompt": MMLU.prompt(q, one.shots), "answer": "ABCD".index(q.answer)}
        for one in subjects
        for q in one.questions
    ]
    _write_task(folder, "bench_mmlu", rows, CHOICE)
    shots = "".join(f"Question: What is {i} + {i}?\nAnswer: It is {2 * i}.\n\n" for i in range(40))
    sums = [
        {"prompt": f"{shots}Question: {q.text}\nAnswer:", "target": q.choices[0]}
        for one in subjects
        for q in one.questions[:6]
    ]
    _write_task(folder, "bench_text", sums, TEXT)
    return folder


def _write_task(folder: Path, name: str, rows: list[dict[str, Any]], kind: str) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)


def run_harness(model: str, tasks: str, name: str, batch_size: str, output: str) -> None:
    """Runs a task by the harness's hf backend; a command of its own."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf",
        {"pretrained": model, "dtype": "float32", "device": "cpu"},
        tasks=[name],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        batch_size=int(batch_size),
        bootstrap_iters=0,
    )
    rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
    Path(output).write_text(json.dumps([row["filtered_resps"] for row in rows]))


def timed(command: list[str], threads: int = 2) -> tuple[float, float, str]:
    """Runs a command, and returns its seconds, those of CPU, and what it wrote to stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TQDM_DISABLE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=7200
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, done.stderr


def ours(*arguments: object) -> list[str]:
    """Returns one of our commands."""
    return [sys.executable, "-W", "ignore", "-m", "glm3cli", "eval", *map(str, arguments)]


def theirs(*arguments: object) -> list[str]:
    """Returns a command of the harness."""
    module = "tests.benchmarks.bench_eval"
    return [sys.executable, "-W", "ignore", "-m", module, "--harness", *map(str, arguments)]


def alternate(ways: dict[str, list[str]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each command; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    used: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            seconds, cpu, _ = timed(command)
            times[name].append(seconds)
            used[name].append(cpu)
            print(f"  {name:24} {seconds:8.1f} s, {cpu:8.1f} s of CPU", flush=True)
    first, *others = used
    for name in others:
        ratio = statistics.median(used[name]) / statistics.median(used[first])
        print(f"{name} takes {ratio:.2f} x the CPU of {first}")
    return {name: statistics.median(found) for name, found in times.items()}


def compare_choices(folder: Path, mmlu: Path, rounds: int) -> None:
    """Compares 200 questions of 10 subjects."""
    model, tasks = folder / "glm", folder / "tasks"
    common = ["--model", model, "--device", "cpu", "--output", folder / "ours.json"]
    mine = ours(
        "mmlu", *common, "--data-dir", mmlu, "--subjects", ",".join(SUBJECTS), "--limit", 20
    )
    sizes = {
        size: theirs(model, tasks, "bench_mmlu", size, folder / f"{size}.json")
        for size in (1, 16, 32)
    }
    times = alternate({"glm3": mine} | {f"hf, batch {s}": c for s, c in sizes.items()}, rounds)
    questions = json.loads((folder / "ours.json").read_text())["questions"]
    best = min((name for name in times if name != "glm3"), key=lambda name: times[name])
    for name, seconds in times.items():
        print(f"{name:24} {len(questions) / seconds:8.2f} questions/s")
    print(f"glm3 has {times[best] / times['glm3']:.2f} x the speed of {best}")
    answers = json.loads((folder / f"{best.split()[-1]}.json").read_text())
    furthest, differing, close = 0.0, 0, 0
    for question, found in zip(questions, answers, strict=True):
        scores = [float(score) for score, _ in found]
        first, second = sorted(scores)[-1:-3:-1]
        close += first - second <= 1e-4
        furthest = max(
            furthest, *(abs(a - b) for a, b in zip(scores, question["scores"], strict=True))
        )
        differing += first - second > 1e-4 and question["choice"] != "ABCD"[scores.index(first)]
    print(
        f"{differing} of {len(questions)} choices differ, {close} are too close to tell; "
        f"scores within {furthest:.1e}"
    )


def compare_texts(folder: Path, rounds: int) -> None:
    """Compares the generation of answers after long solved examples."""
    model, tasks = folder / "glm", folder / "tasks"
    mine = ours(
        *("harness", "--model", model, "--device", "cpu", "--tasks", "bench_text"),
        *("--include-path", tasks, "--output", folder / "text.json"),
    )
    sizes = {
        size: theirs(model, tasks, "bench_text", size, folder / f"text-{size}.json")
        for size in (1, 16, 32)
    }
    times = alternate({"glm3": mine} | {f"hf, batch {s}": c for s, c in sizes.items()}, rounds)
    best = min((name for name in times if name != "glm3"), key=lambda name: times[name])
    rows = json.loads((folder / "text.json").read_text())["samples"]["bench_text"]
    said = [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    answers = json.loads((folder / f"text-{best.split()[-1]}.json").read_text())
    same = sum(one == other for one, other in zip(said, answers, strict=True))
    print(f"glm3 has {times[best] / times['glm3']:.2f} x the speed of {best}")
    print(f"{same} of {len(said)} texts are the same")


def compare_ranks(folder: Path, mmlu: Path, rounds: int) -> None:
    """Compares two ranks of one thread with one, without the start of the command."""
    names = ("--subjects", ",".join(SUBJECTS), "--limit", "60")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for ranks in rates:
            common = ["--model", folder / "glm", "--device", "cpu", "--nproc", ranks]
            output = folder / f"ranks-{ranks}.json"
            command = ours("mmlu", *common, "--data-dir", mmlu, *names, "--output", output)
            rates[ranks].append(_speed(timed(command, threads=1)[2])[0])
    for ranks, found in rates.items():
        print(f"dp {ranks}: {statistics.median(found):8.2f} questions/s")
    print(f"{statistics.median(rates[2]) / statistics.median(rates[1]):.2f} x")


def run_full(folder: Path, mmlu: Path) -> None:
    """Asks all questions."""
    common = ["--model", folder / "glm", "--device", "cpu", "--output", folder / "full.json"]
    seconds, cpu, told = timed(ours("mmlu", *common, "--data-dir", mmlu))
    rate, share = _speed(told)
    print(
        f"14,042 questions in {seconds:.0f} s with {cpu:.0f} s of CPU: {rate} questions/s; "
        f"the model takes {share:.0%} of the time"
    )


def _speed(told: str) -> tuple[float, float]:
    """Returns the questions per second and the model's share of the time, as our command says."""
    found = re.search(r"([\d.,]+) questions/s, ([\d.]+)% of the time in the model", told)
    assert found is not None, told
    return float(found[1].replace(",", "")), float(found[2]) / 100


def main() -> None:
    """Prints the figures of a part."""
    if sys.argv[1:2] == ["--harness"]:
        run_harness(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--mmlu", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--part", choices=["choices", "generation", "ranks", "full"], default="choices"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = SHAPES["35M" if given.part == "full" else "small"]
        write_model(folder, shape, given.tokenizer)
        write_tasks(folder / "tasks", given.mmlu, 20)
        if given.part == "choices":
            compare_choices(folder, given.mmlu, given.rounds)
        elif given.part == "generation":
            compare_texts(folder, given.rounds)
        elif given.part == "ranks":
            compare_ranks(folder, given.mmlu, given.rounds)
        else:
            run_full(folder, given.mmlu)


if __name__ == "__main__":
    main()
