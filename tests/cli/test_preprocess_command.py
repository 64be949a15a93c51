"""`glm3 preprocess` from the outside: its options, what it prints, and how it stops."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import typer
from typer.testing import CliRunner

from glm3cli.cli import preprocess as data
from glm3cli.errors import ConfigError, DataError
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

PROGRAM = """
import sys, typer
from glm3cli.cli import preprocess as data
from glm3cli.errors import Glm3Error
app = typer.Typer()
data.register(app)
try:
    app()
except Glm3Error as error:
    print("error:", error.message, file=sys.stderr)
    sys.exit(error.exit_code)
finally:
    print("heavy:", sorted({"torch", "numpy", "pyarrow", "sentencepiece"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    data.register(app)
    return app


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "the fox"}\n{"text": "a lazy dog"}\n')
    return path


def call(app: typer.Typer, *arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def common(tmp_path: Path) -> list[object]:
    return ["--tokenizer", tiny_tokenizer_folder(), "--output-prefix", tmp_path / "out"]


def test_the_result_as_json(app, tmp_path, source):
    result = call(app, "--input", source, *common(tmp_path), "--json")
    summary = json.loads(result.stdout)
    assert {"documents", "tokens", "bytes", "seconds", "skipped", "files"} <= set(summary)
    assert (summary["documents"], summary["bytes"], summary["skipped"]) == (2, 17, 0)
    assert summary["files"] == [str(tmp_path / f"out_text_document.{s}") for s in ("bin", "idx")]
    assert all(Path(name).is_file() for name in summary["files"])


def test_the_result_for_people(app, tmp_path, source):
    result = call(app, "--input", source, *common(tmp_path))
    assert result.stdout.startswith("2 documents, ")
    assert str(tmp_path / "out_text_document.idx") in result.stdout


def test_input_takes_several_paths_and_repeats(app, tmp_path, source):
    """A shell turns `--input *.jsonl` into several words."""
    result = call(app, "--input", source, source, "--input", source, *common(tmp_path), "--json")
    assert json.loads(result.stdout)["documents"] == 6


def test_modellinks_spellings(app, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"instruction": "the fox", "input": "", "output": "over"}\n')
    arguments = ["--tokenizer-name-or-path", tiny_tokenizer_folder()]
    arguments += ["--output-prefix", tmp_path / "out", "--append-eod", "--workers", 1]
    call(app, "--input", source, "--handler-name", "GeneralInstructionHandler", *arguments)
    assert (tmp_path / "out_packed_labels_document.idx").is_file()


def test_options_from_a_file(app, tmp_path, source):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"input: [{source}]\ntokenizer: {tiny_tokenizer_folder()}\n"
        f"output_prefix: {tmp_path / 'out'}\nappend_eod: true\n"
    )
    with_end = json.loads(call(app, "--config", config, "--json").stdout)
    without = json.loads(call(app, "--config", config, "--json", "--no-append-eod").stdout)
    assert with_end["tokens"] == without["tokens"] + 2


def test_a_preview_prints_tokens_and_writes_nothing(app, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"messages": [{"role": "assistant", "content": "the fox"}]}\n')
    result = call(app, "--input", source, *common(tmp_path), "--handler", "chat", "--preview", 1)
    assert f"{source}:1" in result.stdout
    assert "-100  '<|assistant|>'" in result.stdout
    assert list(tmp_path.iterdir()) == [source]


def test_a_preview_as_json(app, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"messages": [{"role": "assistant", "content": "the fox"}]}\n')
    options = ["--handler", "chat", "--preview", 1, "--json"]
    result = call(app, "--input", source, *common(tmp_path), *options)
    shown = json.loads(result.stdout)
    assert shown["where"] == f"{source}:1"
    names = [token["token"] for token in shown["tokens"]]
    assert names[:3] == ["[gMASK]", "sop", "<|assistant|>"]
    assert shown["tokens"][2]["label"] == -100
    assert shown["tokens"][-1] == {"token": "</s>", "id": 2, "label": 2}


LINES = b'{"text": "the fox"}\n{"text": "a lazy dog"}\n'
PIPES = {
    "lines": LINES,
    "an array": b'[{"text": "the fox"}, {"text": "a lazy dog"}]',
    "gzip": gzip.compress(LINES, mtime=0),
    "zstd": pyarrow.compress(LINES, "zstd", asbytes=True),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "text": b"the fox\na lazy dog\n",
}


@pytest.mark.parametrize("content", PIPES.values(), ids=PIPES)
def test_a_pipe_is_read(app, tmp_path, source, content):
    call(app, "--input", source, *common(tmp_path))
    (tmp_path / "piped").mkdir()
    process = program(
        *("--input", "-", "--tokenizer", tiny_tokenizer_folder(), "--json"),
        *("--output-prefix", tmp_path / "piped/out"),
        stdin=subprocess.PIPE,
    )
    process.stdin.buffer.write(content)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[0])["documents"] == 2
    for name in ("out_text_document.bin", "out_text_document.idx"):
        assert (tmp_path / "piped" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert json.loads((tmp_path / "piped/out.stats.json").read_text())["job"]["inputs"] is None


def test_the_same_again_is_said_to_be_there(app, tmp_path, source):
    call(app, "--input", source, *common(tmp_path))
    result = call(app, "--input", source, *common(tmp_path))
    assert result.stdout.startswith("2 documents, ")
    assert "MB of text before" in result.stdout
    assert json.loads(call(app, "--input", source, *common(tmp_path), "--json").stdout)["repeated"]


@pytest.mark.parametrize(
    ("name", "content", "share"),
    [
        ("in.jsonl.gz", gzip.compress(LINES * 9, mtime=0)[:-9], "an unknown part is lost"),
        ("in.json", b'[{"text": "the fox"}] [{"text": "x"}]  ', "43.6% is lost"),
        ("in.parquet", b"PAR1", "100.0% is lost"),
    ],
)
def test_input_that_cannot_be_read_whole_ends_with_an_error(
    app, tmp_path, source, name, content, share
):
    """The output holds the rest; the same again, which does nothing, ends so, too."""
    (tmp_path / name).write_bytes(content)
    options = ["--input", source, tmp_path / name, "--on-error", "skip", *common(tmp_path)]
    for _ in range(2):
        with pytest.raises(DataError, match=f"not all input could be read: .*{name} .{share}"):
            call(app, *options)
        stats = json.loads((tmp_path / "out.stats.json").read_text())
        assert list(stats["lost"]) == [str(tmp_path / name)]
        assert stats["documents"] >= 2
    assert stats["bad_rows"] == 1


def test_wrong_usage_is_a_sentence(app, tmp_path, source):
    with pytest.raises(ConfigError, match="did you mean GeneralPretrainHandler"):
        call(app, "--input", source, *common(tmp_path), "--handler", "GeneralPretrain")
    with pytest.raises(ConfigError, match="--input is missing"):
        call(app, *common(tmp_path))
    with pytest.raises(ConfigError, match="tokenizer"):
        call(app, "--input", source, "--output-prefix", tmp_path / "out")
    with pytest.raises(DataError, match=r"no\.jsonl does not exist"):
        call(app, "--input", tmp_path / "no.jsonl", *common(tmp_path))


def program(*arguments: object, before: str = "", **options: object) -> subprocess.Popen[str]:
    """Starts the command in a process of its own, after the lines of code in `before`."""
    words = [sys.executable, "-c", before + PROGRAM, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, **options)


def test_help_imports_nothing_heavy():
    process = program("--help")
    stdout, _ = process.communicate(timeout=60)
    assert "--output-prefix" in stdout
    assert "heavy: []" in stdout


def test_progress_is_plain_lines_without_a_terminal(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "the quick brown fox jumps"}\n' * 3000)
    # However quick the machine is, a second has passed since the last line.
    patience = "from glm3cli.cli import progress\nprogress._SECONDS_BETWEEN_DOCUMENT_LINES = 0.0\n"
    process = program("--input", source, *common(tmp_path), "--workers", 1, before=patience)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert [line.split("  ")[1] for line in stderr.splitlines()] == [
        f"{number},000 documents" for number in (1, 2, 3)
    ]
    assert "docs/s" in stderr
    assert "\x1b" not in stderr
    assert stdout.startswith("3,000 documents")


ROWS = f'{{"text": "{"the quick brown fox 你好 " * 50}"}}\n'.encode() * 100


def endless(prefix: Path, workers: int) -> subprocess.Popen[str]:
    """Starts a run on a pipe that nobody closes, so that it can't end by itself."""
    return program(
        *("--input", "-", "--tokenizer", tiny_tokenizer_folder(), "--workers", workers),
        *("--output-prefix", prefix),
        start_new_session=True,
        stdin=subprocess.PIPE,
    )


def feed_until(is_reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Writes rows to the pipe of a run until it has done what is awaited."""
    assert process.stdin is not None
    while not is_reached():
        process.stdin.buffer.write(ROWS)
        process.stdin.buffer.flush()


def test_an_interrupt_while_workers_start_ends_quietly(tmp_path):
    with endless(tmp_path / "out", 2) as process:
        feed_until((tmp_path / ".out_text_document.unfinished").exists, process)
        time.sleep(0.1)  # about when they start
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
        assert (process.returncode, process.stderr.read()) == (130, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_leaves_nothing_behind(tmp_path, number, workers):
    with endless(tmp_path / "out", workers) as process:
        feed_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".*/*.bin")), process)
        os.killpg(process.pid, number)  # as a terminal or a scheduler does: to the whole group
        process.wait(60)
        assert process.returncode == (143 if number == signal.SIGTERM else 130)
        if number == signal.SIGTERM:
            assert process.stderr.read().endswith("stopped by SIGTERM\n")
    assert not list(tmp_path.iterdir())


def test_a_long_folder_for_temporary_files_and_few_open_files(tmp_path, source):
    """The paths of sockets between processes have a limit, and each is an open file."""
    source.write_bytes(LINES * 2000)
    folder = tmp_path / ("t" * 100)
    folder.mkdir()
    options = ["--input", source, "--workers", 2]
    process = program(*options, *common(tmp_path), env={**os.environ, "TMPDIR": str(folder)})
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout[:5]) == (0, "4,000"), stderr
    few = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
    process = program(*options, "--force", *common(tmp_path), before=few)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 4
    assert stderr.startswith("error: this process may open 20 files at once, and needs 28")
