"""Files that are whole, fingerprints, memory, and versions, as the machine around us has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm3cli.host import files, fingerprints, memory
from glm3cli.host.files import existing_parent, write_json
from glm3cli.host.fingerprints import fingerprint
from glm3cli.host.parsing import read_json
from glm3cli.host.versions import versions
from glm3cli.version import __version__


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"x": 1 / 3})
    assert json.loads(path.read_text()) == {"x": 1 / 3}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1 / 3}


def test_a_file_may_name_another_whose_name_is_no_utf8(tmp_path):
    name = os.fsdecode("湖.jsonl".encode("gbk"))
    write_json(tmp_path / "results.json", {"source": name})
    assert read_json(tmp_path / "results.json") == {"source": name}


def test_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert existing_parent(tmp_path / "a/b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path
    assert existing_parent(tmp_path.relative_to(tmp_path) / "new") == tmp_path


def test_what_is_not_installed_has_no_version():
    found = versions("torch", "no-such-package")
    assert found["glm3"] == __version__
    assert found["torch"].startswith("2.")
    assert found["no-such-package"] == "absent"


V2, V1 = ("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")
GROUPS = {
    "none": ("", {}, None),
    "no limit": ("0::/\n", {"": (V2, "max", 1000)}, None),
    "version 2": ("0::/\n", {"": (V2, "5000", 1000)}, 4000),
    "a group within": ("0::/a/b\n", {"a/b": (V2, "5000", 1000), "": (V2, "max", 0)}, 4000),
    "a tighter one around": ("0::/a/b\n", {"a/b": (V2, "5000", 1), "a": (V2, "900", 500)}, 400),
    "a path of the host": ("0::/host/x\n", {"": (V2, "5000", 1000)}, 4000),
    "version 1": ("4:cpu,memory:/a\n0::/\n", {"memory/a": (V1, "5000", 1000)}, 4000),
}


@pytest.mark.parametrize(("own", "groups", "left"), GROUPS.values(), ids=GROUPS)
def test_a_container_limits_the_memory(tmp_path, monkeypatch, own, groups, left):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    for name, ((limit, used), most, amount) in groups.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / limit).write_text(f"{most}\n")
        (tmp_path / name / "memory.stat").write_text(f"rss 7\n{used} {amount}\nfile 77\n")
    assert min((limit.left for limit in memory.limits()), default=None) == left


# --- fingerprints ---


def test_a_fingerprint_goes_by_content_and_size_alone(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c/a", "one"), ("d", "onetwo"), ("e", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    of = {name: fingerprint([tmp_path / part for part in name]) for name in ("ab", "ba", "d", "de")}
    assert fingerprint([tmp_path / "c/a", tmp_path / "b"]) == of["ab"]
    assert len(set(of.values())) == 4
    assert all(text.startswith("6 bytes (") for text in of.values())


def test_large_files_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_BLOCK", 2)
    monkeypatch.setattr(fingerprints, "_BLOCKS", 4)
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(range(60)))
    small.write_bytes(b"abcd")
    before = fingerprint([large, small])
    seen = []
    for file in (large, small):
        for place in range(file.stat().st_size):
            changed = bytearray(file.read_bytes())
            changed[place] ^= 1
            file.write_bytes(changed)
            seen += [(file.name, place)] if fingerprint([large, small]) != before else []
            changed[place] ^= 1
            file.write_bytes(changed)
    found = {name: [place for one, place in seen if one == name] for name in ("large", "small")}
    assert found == {"large": [0, 1, 19, 20, 38, 39, 58, 59], "small": [0, 1, 2, 3]}


# --- JSON ---


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xe6\xb9\x96"}')
    assert read_json(tmp_path / "a.json") == {"a": "湖"}


@pytest.mark.parametrize("text", [b"{", b'{"a": "\xc4\xe3"}', b"[" * 9999, b"9" * 5000, b"\0", b""])
def test_what_is_no_json_is_a_value_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=r".+"):
        read_json(tmp_path / "a.json")


def test_large_values_are_written_by_calls_of_a_mebibyte(tmp_path, monkeypatch):
    written = []

    def pwrite(descriptor, values, place):
        written.append(original(descriptor, values[: 2**19 + 3], place))  # less than was asked for
        assert len(values) <= 2**20
        return written[-1]

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    values = os.urandom(2**21 + 12_345)
    with files.LargeFile(tmp_path / "new") as file:
        assert file.write(b"head", 0) == 4
        assert file.write(values, 4) == 4 + len(values)
    assert (tmp_path / "new").read_bytes() == b"head" + values
    assert max(written) == 2**19 + 3
    with files.LargeFile(tmp_path / "new") as file:
        assert file.write(values, 5) == 5 + len(values)
    assert (tmp_path / "new").read_bytes() == b"head" + values[:1] + values


@pytest.mark.parametrize("closed", [True, False])
def test_messages_that_nobody_reads_are_dropped(tmp_path, closed):
    """Also where stderr was closed, so that the next file would get its number."""
    program = (
        "import os, sys; from glm3cli.host.terminal import keep_stderr_unfailing as keep; keep();"
        "file = open(sys.argv[1], 'w'); print('lost', file=sys.stderr, flush=True);"
        "sys.stderr.isatty(); file.write('kept'); file.close()"
    )
    read, write = os.pipe()
    os.close(read)
    path = tmp_path / "file"
    words = [sys.executable, "-c", program, str(path)]
    if closed:
        words = ["sh", "-c", '"$@" 2>&-', "sh", *words]
    done = subprocess.run(words, stderr=write, check=False)
    os.close(write)
    assert done.returncode == 0
    assert path.read_text("utf-8") == "kept"
