"""Whatever ends a conversion, and whenever: the target is nothing or complete."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.files.staging import remove_stale
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig
from tests.support.checkpoints import write_hf
from tests.support.killing import free_process_number, hashes, run_conversion, start

KILLS = 30
_PATIENCE = 200  # seconds; for machines that do much else
SOME_MEGABYTES = ModelConfig(
    num_layers=4,
    hidden_size=384,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=48,
    padded_vocab_size=2048,
    seq_length=32,
    torch_dtype="fp16",
)
OPTIONS = {
    "mcore": ConvertOptions(layout="mcore", parallel=ModelParallelConfig(tp=2, pp=2)),
    "dist": ConvertOptions(layout="dist"),
    "chatglm": ConvertOptions(layout="chatglm", shard_bytes=4_000_000),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("source") / "hf", model=SOME_MEGABYTES, shards=2)


def begin(*args, log, **options):
    """A conversion that has just begun."""
    log.write_text("")
    process = start(run_conversion, *args, log, **options)
    deadline = time.monotonic() + _PATIENCE
    while "begins" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return process


def end(process):
    process.join(_PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.slow
def test_kill_9_at_any_moment(hf, tmp_path):
    before = hashes(hf)
    moments = random.Random(5)
    expected, seconds = {}, {}
    folder, log = tmp_path / "new", tmp_path / "log"
    folder.mkdir()
    for layout, options in OPTIONS.items():
        process = begin(hf, folder / layout, options, log=log)
        clock = time.monotonic()
        assert end(process) == 0, log.read_text()
        seconds[layout] = time.monotonic() - clock
        expected[layout] = hashes(folder / layout)
    for i in range(KILLS):
        layout = list(OPTIONS)[i % len(OPTIONS)]
        target = folder / layout
        options = OPTIONS[layout]
        subprocess.run(["rm", "-r", target], check=True)
        process = begin(hf, target, options, log=log)
        time.sleep(moments.uniform(0, seconds[layout]))
        process.kill()
        end(process)
        assert hashes(hf) == before
        left = {path.name for path in folder.iterdir()} - set(OPTIONS)
        assert left <= {f".{layout}.partial-{process.pid}"}
        if target.exists():
            assert hashes(target) == expected[layout]
            continue
        assert end(begin(hf, target, options, log=log)) == 0, log.read_text()
        assert hashes(target) == expected[layout]
        assert {path.name for path in folder.iterdir()} == set(OPTIONS)


# A KeyboardInterrupt that nobody catches ends a process of multiprocessing with 1.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
@pytest.mark.parametrize("layout", OPTIONS)
def test_signals_leave_nothing(hf, tmp_path, number, code, layout):
    before = hashes(hf)
    (tmp_path / "new").mkdir()
    log = tmp_path / "log"
    process = begin(hf, tmp_path / "new/model", OPTIONS[layout], log=log, stays=True)
    while not any((tmp_path / "new").iterdir()):
        time.sleep(0.001)
    os.kill(process.pid, number)
    assert end(process) == code, log.read_text()
    assert list((tmp_path / "new").iterdir()) == []
    assert hashes(hf) == before


# The program, whose conversions wait forever once they have begun to write.
STAYS = """
import time
from glm3cli.__main__ import main
from glm3cli.cli import progress

progress._byte_lines = lambda: lambda state: state.done and time.sleep(1000)
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes_of_signals(hf, tmp_path, number, code):
    (tmp_path / "new").mkdir()
    command = [sys.executable, "-c", STAYS, "convert", "hf2mg", hf, tmp_path / "new/model"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not any((tmp_path / "new").iterdir()):
        time.sleep(0.001)
    process.send_signal(number)
    _, log = process.communicate(timeout=_PATIENCE)
    assert process.returncode == code, log
    assert "Traceback" not in log
    assert list((tmp_path / "new").iterdir()) == []


def test_the_leftover_of_a_killed_run_is_removed(hf, tmp_path, caplog):
    stale = tmp_path / f".new.partial-{free_process_number()}"
    other = tmp_path / f".new.partial-{os.getppid()}"
    unrelated = tmp_path / ".new.partial-x"
    for folder in (stale, other, unrelated):
        folder.mkdir()
        (folder / "half").write_text("x")
    convert(hf, tmp_path / "new", OPTIONS["dist"])
    assert f"removed {stale}, which a killed run had left" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"new", other.name, unrelated.name}


def test_what_a_killed_run_had_moved_aside_comes_back(tmp_path, caplog):
    aside = tmp_path / f".new.old-{free_process_number()}"
    aside.mkdir()
    (aside / "weights").write_text("x")
    remove_stale(tmp_path / "new")
    assert (tmp_path / "new/weights").read_text() == "x"
    assert "which a killed run had moved aside" in caplog.text
    aside.mkdir()
    remove_stale(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def mounted(folder, megabytes):
    """Whether a small disk of its own could be mounted at `folder`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("layout", OPTIONS)
def test_a_disk_that_becomes_full(hf, tmp_path, layout):
    log, disk = tmp_path / "log", tmp_path / "disk"
    limit = None if mounted(disk, 40) else 3_000_000
    try:
        # The space goes after the check at the beginning: what is there is larger than its margin.
        process = start(fill_and_convert, hf, disk / "new", OPTIONS[layout], log, limit)
        assert end(process) == 3, log.read_text()
        reason = "No space left on device" if limit is None else "File too large"
        assert reason in log.read_text() or "the disk is full or failing" in log.read_text()
        assert {path.name for path in disk.iterdir()} <= {"filler"}
    finally:
        if limit is None:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_and_convert(source, target, options, log, limit):
    from glm3cli.checkpoint.convert import convert as module

    check = module.check_needs

    def check_and_fill(folder, needs):
        check(folder, needs)
        if limit is None:
            (folder.parent / "filler").write_bytes(b"x" * 30_000_000)

    module.check_needs = check_and_fill
    run_conversion(source, target, options, log, limit)
