"""Mistakes that `glm3 pretrain` and `glm3 finetune` refuse, and what the user reads."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.support.project import (
    Project,
    call,
    environment,
    glm3,
)
from tests.support.train_command import checkpoints, options


def write_bad_task(prefix: Path, num_rows: int = 40) -> Path:
    """Writes instructions of which the run's second sample has a token beyond the vocabulary."""
    order = np.arange(num_rows)
    np.random.RandomState(1234).shuffle(order)
    for key in ("input_ids", "attention_mask", "labels"):
        name = f"{prefix}_packed_{key}_document"
        builder = IndexedDatasetBuilder(f"{name}.bin", dtype=np.int32)
        for row in range(num_rows):
            tokens = torch.full((10,), 1 if key == "attention_mask" else 5)
            if key != "attention_mask" and row == order[1]:
                tokens[4] = 5000
            builder.add_document(tokens, [10])
        builder.finalize(f"{name}.idx")
    return prefix


@pytest.mark.slow
@pytest.mark.dist
def test_the_error_of_any_rank_reaches_the_user_once(project: Project, tmp_path: Path) -> None:
    # So many that the look at some of them, before the first step, misses the bad one.
    data = write_bad_task(tmp_path / "bad", num_rows=3000)
    changes = {"data": data, "split": "1,0,0", "micro_batch_size": 1, "global_batch_size": 2}
    arguments = options(project, tmp_path / "run", "finetune", nproc=2, **changes)
    ended = glm3(tmp_path / "log", *arguments)
    assert ended.code == 3, ended.err
    sentence = "error: sample 1 has token id 5000, but the model's vocabulary has 1024 entries"
    assert ended.err.count(sentence) == 1
    assert ended.err.count("error: ") == 1
    assert ended.err.count("hint: ") == 1
    assert not checkpoints(tmp_path / "run")


@dataclass(frozen=True)
class Case:
    """A wrong command.

    Attributes:
        changes: Returns the options that make it wrong.
        code: The exit code.
        error: A part of the error's message.
        hint: A part of the error's hint.
        command: The command.
    """

    changes: Callable[[Project, Path], dict[str, Any]]
    code: int
    error: str
    hint: str
    command: str = "pretrain"


def edited(project: Project, folder: Path, **changes: Any) -> Path:
    """Makes a model folder with another config.json; None removes a key."""
    model = folder / "edited"
    shutil.copytree(project.model, model, dirs_exist_ok=True)
    values = json.loads((model / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (model / "config.json").write_text(json.dumps(kept))
    return model


def without_tokenizer(project: Project, folder: Path) -> Path:
    model = edited(project, folder)
    (model / "tokenizer.model").unlink()
    return model


def file_in(folder: Path, text: str = "") -> Path:
    (folder / "file").write_text(text)
    return folder / "file"


SCRATCH: dict[str, Any] = {"model": None, "from_scratch": True, "model_config": "tiny"}
EARLY = {
    "missing model": Case(
        lambda p, t: {"model": t / "none"}, 3, "none does not exist", "give a model folder"
    ),
    "folder without weights": Case(
        lambda p, t: {"model": p.tokenizer}, 3, "holds no weights", "training run"
    ),
    **{
        f"a run {name} the model": Case(
            lambda p, t, place=place: {"model": edited(p, t), "save": place(t / "edited")},
            2,
            "lie in one another",
            "give the run a folder elsewhere",
        )
        for name, place in {
            "in": lambda model: model / "run",
            "around": lambda model: model.parent,
            "of": lambda model: model,
        }.items()
    },
    **{
        f"an export to {name}": Case(
            lambda p, t, name=name: {"export_hf": t / name},
            2,
            "lies among the files of --save or --model, or around them",
            "give a folder elsewhere, or",
            "finetune",
        )
        for name in (".", "run", "run/data", "run/data/hf", "run/iter_0000009/hf", "run/best")
    },
    "an export into the model": Case(
        lambda p, t: {"export_hf": p.model / "hf"},
        2,
        "lies among the files of --save or --model, or around them",
        "give a folder elsewhere",
        "finetune",
    ),
    "steps whose samples don't fit into the memory": Case(
        lambda p, t: {"train_iters": 2**62},
        2,
        "--train-iters 4,611,686,018,427,387,904 x --global-batch-size",
        "--exit-duration ends a run by time",
    ),
    "missing data": Case(
        lambda p, t: {"data": p.folder / "text"},
        3,
        "text.idx does not exist",
        "pretrain --data {folder}/text_text_document",
    ),
    "missing data, nothing near": Case(
        lambda p, t: {"data": t / "none"}, 3, "none.idx does not exist", "glm3 preprocess"
    ),
    "instructions for pretrain": Case(
        lambda p, t: {"data": p.task},
        3,
        "task.idx does not exist",
        "finetune --data {folder}/task\n",
    ),
    "text for finetune": Case(
        lambda p, t: {"data": p.text},
        3,
        "text_text_document_packed_input_ids_document.idx does not exist",
        "pretrain --data {folder}/text_text_document\n",
        "finetune",
    ),
    "weights for some data": Case(
        lambda p, t: {"data": f"2:{p.text}", "data-path": p.text},
        2,
        "some have a weight",
        "for none",
    ),
    "tp": Case(
        lambda p, t: {"tp": 3, "nproc": 3},
        2,
        "num_attention_heads 4 is not divisible by --tp 3",
        "use --tp 1, 2 or 4",
    ),
    "pp": Case(
        lambda p, t: {"pp": 3, "nproc": 3},
        2,
        "num_layers 2 is not divisible by --pp 3",
        "pp x vpp = 1 or 2",
    ),
    "ranks": Case(
        lambda p, t: {"tp": 2, "nproc": 3}, 2, "3 rank(s) can't hold --tp 2", "--nproc 2"
    ),
    "too few ranks": Case(
        lambda p, t: {"tp": 2, "pp": 2}, 2, "1 rank(s) can't hold --tp 2 x --pp 2", "--nproc 4"
    ),
    "global batch": Case(
        lambda p, t: {"global_batch_size": 5}, 2, "--global-batch-size 5", "use a multiple of 2"
    ),
    "sequence": Case(
        lambda p, t: {"seq_length": 15, "tp": 2, "nproc": 2}, 2, "--seq-length 15", "use a multiple"
    ),
    "two starts": Case(
        lambda p, t: {"from_scratch": True, "model_config": "tiny"},
        2,
        "give either --model MODEL or --from-scratch",
        "--help",
    ),
    "no start": Case(lambda p, t: {"model": None}, 2, "give either --model MODEL", "--help"),
    "no shape": Case(
        lambda p, t: {"model": None, "from_scratch": True}, 2, "needs --model-config", "--help"
    ),
    "missing shape": Case(
        lambda p, t: SCRATCH | {"model_config": t / "none", "tokenizer": p.tokenizer},
        3,
        "none does not exist",
        "config.json",
    ),
    "no tokenizer to start from": Case(
        lambda p, t: SCRATCH, 2, "no model folder to take the tokenizer from", "give --tokenizer"
    ),
    "missing tokenizer": Case(
        lambda p, t: {"tokenizer": t / "none"}, 3, "none does not exist", "tokenizer.model"
    ),
    "model without tokenizer": Case(
        lambda p, t: {"model": without_tokenizer(p, t)},
        3,
        "tokenizer.model does not exist",
        "give --tokenizer",
    ),
    "missing field": Case(
        lambda p, t: {"model": edited(p, t, hidden_size=None)},
        3,
        "config.json lacks hidden_size",
        "take the config.json",
    ),
    "other family": Case(
        lambda p, t: {"model": edited(p, t, model_type="llama")},
        3,
        "is of the family 'llama'",
        "glm3 takes models of ChatGLM2, ChatGLM3 and GLM-4",
    ),
    "save is a file": Case(lambda p, t: {"save": file_in(t)}, 2, "file is a file", "give a folder"),
    "save below a file": Case(
        lambda p, t: {"save": file_in(t) / "run"}, 2, "file is a file", "give a folder"
    ),
    "learning rates": Case(
        lambda p, t: {"min_lr": 1}, 2, "--min-lr 1.0 is above --lr 0.001", "--help"
    ),
    "no length": Case(lambda p, t: {"train_iters": None}, 2, "--train-iters is missing", "--help"),
    "unknown key": Case(
        lambda p, t: {"config": file_in(t, "seq_lenth: 3")},
        2,
        "did you mean 'seq_length'",
        "--help",
    ),
}
# Runs many wrong commands in one process, which stays small as long as nothing heavy is imported.
PROGRAM = """
import contextlib, io, json, sys
from glm3cli.cli.app import main
ended = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err, code = ["glm3", *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as error:
            code = error.code
    heavy = sorted({"torch", "numpy", "megatron", "pyarrow"} & set(sys.modules))
    ended.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def early(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[Any]]]:
    """Runs the early cases, and returns the folder that each was given and how it ended."""
    folders = {name: tmp_path_factory.mktemp("case") for name in EARLY}
    commands = [
        [
            str(argument)
            for argument in options(
                project,
                **{"save": folders[name] / "run", "command": case.command}
                | case.changes(project, folders[name]),
            )
        ]
        for name, case in EARLY.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
        timeout=100,
    )
    found = json.loads(done.stdout)
    return {name: (folders[name], ended) for name, ended in zip(EARLY, found, strict=True)}


@pytest.mark.parametrize("name", EARLY)
def test_what_is_cheap_to_see_is_refused_before_torch(
    early: dict[str, tuple[Path, list[Any]]], project: Project, name: str
) -> None:
    case, (folder, (code, out, err, heavy)) = EARLY[name], early[name]
    assert code == case.code
    assert case.error in err
    assert case.hint.format(folder=project.folder) in err.split("hint: ")[1]
    assert err.startswith("error: ")
    assert not out
    assert not heavy
    assert not (folder / "run").exists()


def test_a_token_beyond_the_vocabulary_is_named(project: Project, tmp_path: Path) -> None:
    data = write_bad_task(tmp_path / "bad")
    changes = {"data": data, "split": "1,0,0", "micro_batch_size": 1}
    ended = call(*options(project, tmp_path / "run", "finetune", **changes))
    assert ended.code == 3, ended.err
    assert "another tokenizer has made the files" in ended.err
    assert "hint: preprocess the data with the model's tokenizer" in ended.err
    assert not checkpoints(tmp_path / "run")


def test_a_split_without_documents_is_refused(project: Project, tmp_path: Path) -> None:
    ended = call(*options(project, tmp_path / "run", split="1,99,0"))
    assert ended.code == 3, ended.err
    assert "--split 1,99,0 of 50 document(s) leaves none for training" in ended.err
    assert not checkpoints(tmp_path / "run")


def test_a_folder_that_one_may_not_write_to_is_refused(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by its permissions: root, as whom the tests may run, writes anywhere.
    monkeypatch.setattr("glm3cli.train.prepare.os.access", lambda path, mode: path != tmp_path)
    ended = call(*options(project, tmp_path / "run"))
    assert ended.code == 2
    assert f"{tmp_path} is not writable" in ended.err


def test_links_that_lead_nowhere_are_named(project: Project, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "not there")
    for save in (tmp_path / "link", tmp_path / "link/run"):
        ended = call(*options(project, save))
        assert ended.code == 2, ended.err
        assert f"{tmp_path / 'link'} is a link to {tmp_path / 'not there'}, which does" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.slow
def test_few_open_files_are_a_sentence_before_the_ranks_start(
    project: Project, tmp_path: Path
) -> None:
    words = [str(word) for word in options(project, tmp_path / "run", nproc=2)]
    limited = f"ulimit -n 64; {shlex.join([sys.executable, '-m', 'glm3cli', *words])}"
    done = subprocess.run(
        ["bash", "-c", limited], env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: this process may open 64 files at once, and needs 128")
    assert "Traceback" not in done.stderr


def test_links_in_a_circle_are_a_sentence(project: Project, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    ended = call(*options(project, tmp_path / "run", "finetune", export_hf=loop))
    assert ended.code == 2, ended.err
    assert "loop" in ended.err
