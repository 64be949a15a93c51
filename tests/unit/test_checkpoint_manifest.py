"""What a conversion needs is said first, and what it made is noted and can be checked."""

import hashlib
import json
import shutil
import zipfile

import pytest
import torch
import xxhash

from glm3cli.checkpoint import scratch
from glm3cli.checkpoint.convert import convert as convert_module
from glm3cli.checkpoint.convert import needs, tensor_digests
from glm3cli.checkpoint.convert.check import check
from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.convert.inspect import inspect
from glm3cli.checkpoint.convert.tensor_digests import Pace
from glm3cli.checkpoint.files.digests import FileDigests, Follower
from glm3cli.checkpoint.files.manifest import MANIFEST, read_manifest
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.version import __version__
from tests.support.checkpoints import random_weights, write_hf
from tests.support.killing import hashes

OPTIONS = {
    "mcore": ConvertOptions(layout="mcore", parallel=ModelParallelConfig(tp=2, pp=2)),
    "vpp": ConvertOptions(layout="legacy", parallel=ModelParallelConfig(pp=2, vpp=2)),
    "dist": ConvertOptions(layout="dist"),
    "chatglm": ConvertOptions(layout="chatglm", shard_bytes=9_000),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("source") / "hf", shards=2)


@pytest.fixture(params=OPTIONS)
def new(hf, tmp_path, request):
    convert(hf, tmp_path / "new", OPTIONS[request.param])
    return tmp_path / "new"


def test_files_and_tensors_are_noted(hf, new):
    manifest = read_manifest(new)
    found = hashes(new)
    del found[MANIFEST]
    assert {name: entry.sha256 for name, entry in manifest.files.items()} == found
    assert all((new / name).stat().st_size == e.bytes for name, e in manifest.files.items())
    assert manifest.tensors == {
        name: xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())
        for name, tensor in random_weights().items()
    }
    assert manifest.source == {"path": str(hf), "layout": "chatglm", "iteration": None}
    assert manifest.verified
    assert manifest.versions["glm3"] == __version__
    assert manifest.versions["torch"] == torch.__version__


def test_settings_are_noted(hf, tmp_path):
    convert(hf, tmp_path / "new", OPTIONS["mcore"])
    settings = read_manifest(tmp_path / "new").settings
    assert settings["layout"] == "mcore"
    assert (settings["tp"], settings["pp"], settings["vpp"]) == (2, 2, 1)


def test_files_of_weights_are_hashed_while_they_are_written(hf, tmp_path, monkeypatch):
    others = []

    def file_digest(path):
        others.append(path.name)
        return original(path)

    def finish(follower, paths):
        paths = list(paths)
        for part in follower._hashing:
            part.result()
        done = sum(follower._digests._done[path] for path in paths)
        shares.append(done / sum(path.stat().st_size for path in paths))
        return original_finish(follower, paths)

    shares = []
    original, original_finish = convert_module.file_digest, Follower.finish
    monkeypatch.setattr(convert_module, "file_digest", file_digest)
    monkeypatch.setattr(Follower, "finish", finish)
    for name, options in OPTIONS.items():
        convert(hf, tmp_path / name, options)
    # Of files as small as these much is headers and directories, which come last.
    assert len(shares) == len(OPTIONS)
    assert min(shares) > 0.4
    assert "model_optim_rng.pt" not in others
    assert not any(name.endswith((".distcp", ".safetensors")) for name in others)
    assert "config.json" in others


def test_bytes_that_were_called_final_stay_as_they_are(hf, tmp_path, monkeypatch):
    notes = []

    def note(follower, path, end):
        notes.append((path.name, end, path.read_bytes()[:end]))
        original(follower, path, end)

    original = Follower.note
    monkeypatch.setattr(scratch, "_BLOCK", 300)  # so that every tensor is several blocks
    monkeypatch.setattr(Follower, "note", note)
    for name, options in OPTIONS.items():
        notes.clear()
        convert(hf, tmp_path / name, options)
        written = {path.name: [] for path in (tmp_path / name).rglob("*")}
        for path in (tmp_path / name).rglob("*"):
            if path.is_file():
                written[path.name].append(path.read_bytes())
        assert all(len(part) == end for _, end, part in notes)
        for file, end, part in notes:
            assert part in [content[:end] for content in written[file]]
        assert len(notes) > 2 * 31
        assert check(tmp_path / name).tensors == 31
        for path in (tmp_path / name).rglob("*.pt"):
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None


def test_a_file_that_can_not_be_hashed_is_an_error_at_the_end(tmp_path):
    paths = [tmp_path / str(i) for i in range(5)]
    for path in paths:
        path.write_bytes(path.name.encode() * 9)
    with Follower() as follower:
        for path in paths:
            follower.note(path, 4)
        expected = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        assert follower.finish(paths).result() == expected
    with Follower() as follower:
        follower.note(paths[0], 4)
        follower.note(tmp_path / "gone", 4)
        with pytest.raises(FileNotFoundError, match="gone"):
            follower.finish(paths).result()


def test_a_tensor_is_looked_at_in_blocks(monkeypatch):
    monkeypatch.setattr(tensor_digests, "_BLOCK", 64)
    for tensor in (torch.randn(7, 30).half()[:, :29], torch.randn(1), torch.randn(16)):
        looked = []
        value = tensor_digests.digest(tensor, lambda block, looked=looked: looked.append(block))
        assert value == xxhash.xxh3_128_hexdigest(tensor.contiguous().numpy().tobytes())
        assert value == tensor_digests.digest(tensor)
        assert torch.equal(torch.cat(looked), tensor.flatten())
        assert max(block.nbytes for block in looked) <= 64


def test_unverified_weights_have_no_file_hashes_but_are_checked(hf, tmp_path):
    convert(hf, tmp_path / "new", ConvertOptions(layout="mcore", verify=False))
    manifest = read_manifest(tmp_path / "new")
    assert not manifest.verified
    assert {entry.sha256 for entry in manifest.files.values()} == {None}
    assert check(tmp_path / "new").tensors == 31
    flip(next((tmp_path / "new").rglob("*.pt")), 9_000)
    with pytest.raises(CheckpointError, match="is not as it was written: tensor transformer"):
        check(tmp_path / "new")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_check_finds_nothing_in_a_sound_folder(new):
    found = check(new)
    assert (found.files, found.tensors) == (len(hashes(new)) - 1, 31)
    moved = new.rename(new.with_name("moved"))
    assert check(moved).folder == str(moved)


def test_check_names_the_file_of_a_flipped_byte(new):
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        if path.name == MANIFEST:
            continue
        before = path.read_bytes()
        for place in {0, len(before) // 2, len(before) - 1}:
            flip(path, place)
            with pytest.raises(CheckpointError, match="is not as it was written") as caught:
                check(new)
            assert path.relative_to(new).as_posix() in caught.value.message
            path.write_bytes(before)


def test_check_names_the_tensor_of_a_flipped_byte(hf, tmp_path):
    convert(hf, tmp_path / "new", ConvertOptions(layout="chatglm"))
    flip(tmp_path / "new/model.safetensors", -1)
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path / "new")
    assert "model.safetensors differs; tensor transformer.output_layer.weight differs" in str(
        caught.value
    )


def test_check_names_a_file_that_is_missing_or_short(hf, tmp_path):
    convert(hf, tmp_path / "new", OPTIONS["dist"])
    (tmp_path / "new/tokenizer.model").write_bytes(b"")
    (tmp_path / "new/common.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"common\.pt is missing; tokenizer\.model has 0 bytes instead of 6"
    ):
        check(tmp_path / "new")


def test_check_wants_a_manifest(hf):
    with pytest.raises(CheckpointError, match=r"has no glm3-manifest\.json"):
        check(hf)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1, "files": {}}'])
def test_a_damaged_manifest(hf, tmp_path, text):
    convert(hf, tmp_path / "new", OPTIONS["dist"])
    (tmp_path / "new" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"glm3-manifest\.json is damaged"):
        check(tmp_path / "new")


def test_a_manifest_of_another_format(hf, tmp_path):
    convert(hf, tmp_path / "new", OPTIONS["dist"])
    path = tmp_path / "new" / MANIFEST
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(CheckpointError, match="has the format 3, but this glm3 knows 2"):
        check(tmp_path / "new")


def test_inspect_shows_it(hf, tmp_path):
    convert(hf, tmp_path / "new", OPTIONS["mcore"])
    for path in (tmp_path / "new", tmp_path / "new/iter_0000001"):
        found = inspect(path)
        assert found.manifest["source"]["layout"] == "chatglm"
        assert (found.manifest["files"], found.manifest["tensors"]) == (9, 31)
        json.dumps(found.manifest)
    assert inspect(hf).manifest is None


def test_the_manifest_of_a_source_is_not_copied(hf, tmp_path):
    convert(hf, tmp_path / "mg", OPTIONS["mcore"])
    convert(tmp_path / "mg", tmp_path / "new", OPTIONS["chatglm"])
    assert read_manifest(tmp_path / "new").source["layout"] == "mcore"


def test_files_are_hashed_in_steps(tmp_path):
    sizes = [5, 7, 30, 3]
    paths = [tmp_path / str(size) for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(range(size)))
    files = FileDigests()
    for path, ends in zip(paths, [(1, 3, 5), (7,), (2, 2, 8_000), ()], strict=True):
        for end in ends:
            files.advance(path, end)
    expected = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert files.finish(paths) == expected


def test_files_are_gone_through_in_the_order_of_reading(tmp_path):
    paths = [tmp_path / str(size) for size in (5, 7, 30, 0, 3)]
    for path in paths:
        path.write_bytes(bytes(int(path.name)))
    parts = []
    pace = Pace([paths[:2], paths[2:4], paths[4:]], lambda *part: parts.append(part))
    pace.advance(6)
    assert parts == [(paths[0], 0, 3), (paths[1], 0, 3)]
    for step in (3, 20, 100):
        pace.advance(step)
    for path in paths:
        ends = [(start, end) for file, start, end in parts if file == path]
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == int(path.name)
    groups = [paths.index(file) // 2 for file, *_ in parts]
    assert groups == sorted(groups)


def test_needs_are_printed_first(hf, tmp_path, capsys):
    convert(hf, tmp_path / "new", OPTIONS["dist"])
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("needs 0.02 GB of disk (")
    assert "of memory (" in first


def test_too_little_disk(hf, tmp_path, monkeypatch):
    usage = shutil.disk_usage(hf)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
    with pytest.raises(ConfigError, match=r"needs 0.02 GB, but the disk has 0.00 GB free"):
        convert(hf, tmp_path / "new", OPTIONS["dist"])
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"of memory, but only 0\.00 GB is available"):
        convert(hf, tmp_path / "new", OPTIONS["dist"])
