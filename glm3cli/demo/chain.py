"""Runs the steps of `glm3 demo` by the commands that a user would type, and checks each of them."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from glm3cli.config.demo import DemoConfig
from glm3cli.demo import content
from glm3cli.demo.kinds import Kind, kind_of
from glm3cli.demo.quiz import MMLU_DIR
from glm3cli.errors import ConfigError

RANKS = ("--nproc", "4", "--tp", "2", "--pp", "2")
# Guessing answers 1 in 4 questions right.
MIN_ACCURACY = 0.6
# Held-out prompts that are asked, and how many answers must be right.
NUM_PROMPTS, MIN_RIGHT = 10, 9


@dataclass(frozen=True)
class Row:
    """One line of the demo's final table: a step and the result of its check.

    Attributes:
        step: The step's name.
        result: What the step did, or how it failed, in words.
        passed: Whether the step's check passed.
        seconds: Time that the step took.
    """

    step: str
    result: str
    passed: bool
    seconds: float


class StepError(Exception):
    """A command of the demo ended with an error; the message has the last lines of its stderr."""


@dataclass
class Chain:
    """One run of the demo: its folder of files and the results of its steps so far.

    Attributes:
        folder: The folder for all files of the demo.
        console: Where the names of the steps and their commands are shown.
        kind: What the demo's kind of model is made of.
        rows: A line of the final table for each step that has ended.
    """

    folder: Path
    console: Console
    kind: Kind
    rows: list[Row] = field(default_factory=list)

    def run(self) -> bool:
        """Runs all steps, up to the first one that fails; returns whether all checks passed."""
        steps: list[tuple[str, Callable[[], tuple[str, bool]]]] = [
            ("train a tokenizer", self._tokenizer),
            ("make a random model", self._model),
            ("convert to tp 2 x pp 2", self._convert),
            ("preprocess", self._preprocess),
            ("pretrain on 4 ranks", self._pretrain),
            ("finetune on 4 ranks", self._finetune),
            ("answer held-out prompts", self._generate),
            ("answer the same on 1 rank", self._generate_alone),
            *([("call a tool", self._call)] if self.kind.calls else []),
            ("evaluate on a mini-MMLU", self._evaluate),
            ("export to Hugging Face", self._export),
        ]
        for name, step in steps:
            started = time.perf_counter()
            self.console.print(f"[bold]{name}[/bold]", highlight=False)
            try:
                result, passed = step()
            except StepError as error:
                result, passed = str(error), False
            self.rows.append(Row(name, result, passed, time.perf_counter() - started))
            if not passed:
                break
        return all(row.passed for row in self.rows)

    def _path(self, name: str) -> str:
        return str(self.folder / name)

    def _glm3(self, *arguments: str) -> str:
        """Runs a glm3 command in a process of its own and returns its stdout.

        Raises:
            StepError: The command's exit code isn't 0.
        """
        self.console.print(f"  glm3 {' '.join(arguments)}", style="dim", highlight=False)
        command = [sys.executable, "-m", "glm3cli", *arguments]
        # Files, not pipes: a process that a killed rank leaves behind would hold a pipe open.
        out, err = self.folder / "stdout.log", self.folder / "stderr.log"
        with out.open("w") as stdout, err.open("w") as stderr:
            code = subprocess.run(command, stdout=stdout, stderr=stderr, check=False).returncode
        if code:
            lines = err.read_text("utf-8", errors="replace").strip().splitlines()[-15:]
            raise StepError(f"exit code {code}: " + "\n".join(lines))
        return out.read_text("utf-8")

    def _tokenizer(self) -> tuple[str, bool]:
        from glm3cli.data.tokens.tokenizer import Tokenizer

        self.kind.write_tokenizer(self.folder / "tokenizer")
        tokenizer = Tokenizer.load(self.folder / "tokenizer")
        texts = content.prose()
        same = all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
        return f"{tokenizer.vocab_size} tokens; {len(texts)} paragraphs decode to themselves", same

    def _model(self) -> tuple[str, bool]:
        from glm3cli.checkpoint.convert.random_model import write_random_model
        from glm3cli.checkpoint.random import RandomSource

        source = RandomSource(self.kind.model, seed=1, std=content.INIT_METHOD_STD)
        write_random_model(self.folder / "hf", source, self.folder / "tokenizer")
        found = json.loads(self._glm3("convert", "inspect", self._path("hf"), "--json"))
        count = found["parameters"]
        return f"{count:,} parameters", count == self.kind.model.num_parameters

    def _convert(self) -> tuple[str, bool]:
        text = self._glm3(
            "convert",
            "hf2mg",
            self._path("hf"),
            self._path("mg"),
            "--tp",
            "2",
            "--pp",
            "2",
            "--json",
        )
        result = json.loads(text)
        files = len(list((self.folder / "mg").rglob("model_optim_rng.pt")))
        done = f"{result['tensors']} tensors in {files} rank files, read back and compared"
        return done, bool(result["verified"]) and files == 4

    def _preprocess(self) -> tuple[str, bool]:
        documents = [{"text": text} for text in content.pretrain_documents()]
        rows = self.kind.rows
        counts = []
        for name, lines, handler in (
            ("text", documents, ("--handler", "text", "--append-eod")),
            ("task", rows, self.kind.handler),
        ):
            self._write_lines(f"{name}.jsonl", lines)
            result = self._glm3(
                *("preprocess", "--input", self._path(f"{name}.jsonl"), *handler, "--json"),
                *("--tokenizer", self._path("hf"), "--output-prefix", self._path(name)),
            )
            counts.append(json.loads(result)["documents"])
        done = f"{counts[0]} documents, {counts[1]} instructions"
        return done, counts == [len(documents), len(rows)]

    def _write_lines(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / name).write_text(text, "utf-8")

    def _pretrain(self) -> tuple[str, bool]:
        return self._train("pretrain", "mg", "text_text_document", content.PRETRAIN, 0.25)

    def _finetune(self) -> tuple[str, bool]:
        return self._train("finetune", "pretrain", "task", self.kind.finetune, 0.25)

    def _train(
        self, command: str, model: str, data: str, recipe: content.Recipe, largest: float
    ) -> tuple[str, bool]:
        """Runs a training command; the last loss must be below `largest` times the first one."""
        options = [
            part
            for key, value in vars(recipe).items()
            for part in ("--" + key.replace("_", "-"), str(value))
        ]
        self._glm3(
            *(command, "--model", self._path(model), "--data", self._path(data)),
            *("--save", self._path(command), *RANKS, "--dtype", "fp32", "--split", "1,0,0"),
            *options,
        )
        lines = (self.folder / command / "metrics.jsonl").read_text("utf-8").splitlines()
        losses = [step["loss"] for step in map(json.loads, lines) if "loss" in step]
        rate = [step["tokens_per_second"] for step in map(json.loads, lines) if "loss" in step]
        first, last = losses[0], sum(losses[-10:]) / 10
        done = f"loss {first:.2f} -> {last:.2f} in {len(losses)} steps, {max(rate):,.0f} tokens/s"
        return done, last < largest * first

    def _generate(self) -> tuple[str, bool]:
        rows = content.held_out_rows()[:NUM_PROMPTS]
        self._write_lines("prompts.jsonl", [{"prompt": row["instruction"]} for row in rows])
        answers = self._ask("answers.json", *RANKS)
        right = sum(a == row["output"] for a, row in zip(answers, rows, strict=True))
        example = f"{rows[0]['instruction']} - {answers[0]}"
        return f"{right} of {len(rows)} right; {example}", right >= MIN_RIGHT

    def _generate_alone(self) -> tuple[str, bool]:
        self._ask("answers_alone.json")
        texts = [
            [
                result["token_ids"]
                for result in json.loads((self.folder / name).read_text())["results"]
            ]
            for name in ("answers.json", "answers_alone.json")
        ]
        same = sum(one == other for one, other in zip(*texts, strict=True))
        return f"{same} of {len(texts[0])} token for token the same", texts[0] == texts[1]

    def _call(self) -> tuple[str, bool]:
        asked = self.kind.calls[:NUM_PROMPTS]
        lines = [{"messages": conversation["messages"][:1]} for conversation in asked]
        self._write_lines("calls.jsonl", lines)
        text = self._glm3(
            *("generate", "--model", self._path("finetune"), "--greedy", "--json", *RANKS),
            *("--prompts-file", self._path("calls.jsonl"), "--max-new-tokens", "32"),
        )
        expected = [_calls_of(conversation["messages"][1]) for conversation in asked]
        found = [_calls_of(result["message"]) for result in json.loads(text)["results"]]
        right = sum(one == other for one, other in zip(found, expected, strict=True))
        return f"{right} of {len(asked)} right; {found[0]}", right >= MIN_RIGHT

    def _ask(self, name: str, *launch: str) -> list[str]:
        text = self._glm3(
            *("generate", "--model", self._path("finetune"), "--no-raw", "--greedy", "--json"),
            *("--prompts-file", self._path("prompts.jsonl"), "--max-new-tokens", "16", *launch),
        )
        (self.folder / name).write_text(text, "utf-8")
        return [result["text"].strip() for result in json.loads(text)["results"]]

    def _evaluate(self) -> tuple[str, bool]:
        text = self._glm3(
            *("eval", "mmlu", "--model", self._path("pretrain"), "--data-dir", str(MMLU_DIR)),
            *("--shots", "0", "--json", "--output", self._path("results.json")),
        )
        result: dict[str, Any] = json.loads(text)
        count = len(result["questions"])
        done = f"{result['micro']:.0%} of {count} questions right, chance is 25%"
        return done, result["micro"] >= MIN_ACCURACY

    def _export(self) -> tuple[str, bool]:
        import torch

        from glm3cli.checkpoint.layouts.opening import open_source
        from glm3cli.checkpoint.names import slots

        self._glm3("convert", "mg2hf", self._path("finetune"), self._path("export"))
        trained, exported = (open_source(self.folder / name) for name in ("finetune", "export"))
        places = list(slots(self.kind.model))
        same = sum(torch.equal(trained.read(*slot), exported.read(*slot)) for slot in places)
        done = f"{same} of {len(places)} tensors equal to the trained ones, bit for bit"
        return done, same == len(places)

    def table(self) -> Table:
        """Returns the final table, with one line per step that has run."""
        total = sum(row.seconds for row in self.rows)
        table = Table(title=f"glm3 demo: {total:.0f} s")
        table.add_column("step")
        table.add_column("result", overflow="fold")
        table.add_column("")
        table.add_column("seconds", justify="right")
        for row in self.rows:
            mark = "[green]ok[/green]" if row.passed else "[red]failed[/red]"
            table.add_row(row.step, row.result, mark, f"{row.seconds:.1f}")
        return table


def _calls_of(turn: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the names and the arguments of the calls in a turn of OpenAI's form."""
    functions = [call["function"] for call in turn.get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def run_demo(config: DemoConfig) -> bool:
    """Runs the demo and prints its table; returns whether all checks passed.

    Raises:
        ConfigError: The folder `config.keep` exists already.
    """
    with _work_folder(config.keep) as folder:
        chain = Chain(folder, Console(stderr=True, soft_wrap=True), kind_of(config.family))
        passed = chain.run()
        Console(width=None if os.isatty(1) else 120).print(chain.table())
    return passed


@contextmanager
def _work_folder(keep: Path | None) -> Iterator[Path]:
    """Makes the folder for the demo's files: `keep`, or a temporary one that is removed again."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="glm3-demo-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    if keep.exists():
        raise ConfigError(f"--keep {keep} exists", "give a new folder")
    keep.mkdir(parents=True)
    yield keep
