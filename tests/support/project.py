"""A small project as a user has it: a model folder, preprocessed files, and the program itself."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
NUM_DOCUMENTS = 50


@dataclass(frozen=True)
class Project:
    """The files of a project.

    Attributes:
        model: A Hugging Face folder with random weights and a tokenizer.
        text: Prefix of preprocessed text.
        task: Prefix of preprocessed instructions.
    """

    folder: Path
    model: Path
    tokenizer: Path
    text: Path
    task: Path


@dataclass(frozen=True)
class Ended:
    """How a call of the program ended."""

    code: int
    out: str
    err: str


def make_project(folder: Path) -> Project:
    """Makes all files of a project in `folder`."""
    from glm3cli.checkpoint.convert.random_model import write_random_model
    from glm3cli.checkpoint.random import RandomSource
    from glm3cli.config.preprocess import PreprocessConfig
    from glm3cli.data.preprocess.run import preprocess
    from glm3cli.demo import content

    content.train_tokenizer(folder / "tokenizer")
    source = RandomSource(content.MODEL, seed=1, std=content.INIT_METHOD_STD)
    write_random_model(folder / "model", source, folder / "tokenizer")
    rows: dict[str, Sequence[dict[str, str]]] = {
        "text": [{"text": text} for text in content.pretrain_documents()[:NUM_DOCUMENTS]],
        "task": content.training_rows()[:NUM_DOCUMENTS],
    }
    options: dict[str, dict[str, Any]] = {
        "text": {"handler": "text", "append_eod": True},
        "task": {"handler": "instruction", "template": "chatglm3"},
    }
    for name, lines in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        config = {
            "input": [file],
            "tokenizer": folder / "tokenizer",
            "output_prefix": folder / name,
            "workers": 1,
            **options[name],
        }
        preprocess(PreprocessConfig.parse(config), lambda _progress: None)
    return Project(
        folder=folder,
        model=folder / "model",
        tokenizer=folder / "tokenizer",
        text=folder / "text_text_document",
        task=folder / "task",
    )


def start(log: Path, *arguments: object, own_group: bool = False) -> subprocess.Popen[bytes]:
    """Starts the program as a user does; its output goes to LOG.out and LOG.err."""
    # Files, not pipes: a process that a killed rank leaves behind would hold a pipe open.
    with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "glm3cli", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(),
            start_new_session=own_group,
        )


def environment() -> dict[str, str]:
    """The environment of a user's shell: without the variables of a rank."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLM3_DEBUG")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PYTHONPATH": str(ROOT)}


def end(process: subprocess.Popen[bytes], log: Path, timeout: float = 150) -> Ended:
    """Waits for a started program."""
    try:
        code = process.wait(timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    out, err = (log.with_suffix(suffix).read_text("utf-8") for suffix in (".out", ".err"))
    return Ended(code, out, err)


def glm3(log: Path, *arguments: object) -> Ended:
    """Runs the program in a process of its own."""
    return end(start(log, *arguments), log)


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def call(*arguments: object, stdin: str = "") -> Ended:
    """Runs the program in this process, which saves the seconds that importing torch takes."""
    from glm3cli.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in STOPS}
    code = 0
    try:
        with (
            mock.patch.object(sys, "argv", ["glm3", *map(str, arguments)]),
            mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            mock.patch.dict(os.environ, environment(), clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as exit_:
                code = int(exit_.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ended(code, out.getvalue(), err.getvalue())


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def steps(run: Path) -> list[dict[str, Any]]:
    """Its training steps."""
    return [record for record in records(run) if "loss" in record]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Its events of one kind."""
    return [record for record in records(run) if record.get("event") == kind]
