"""Which files an input names: links, splits, folders of Hugging Face's, and names that can't be."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from glm3cli.data import folders
from glm3cli.data.files import find_files
from glm3cli.errors import DataError
from tests.support.preprocess_runs import outputs, run, write_lines


@pytest.fixture(autouse=True)
def said(caplog) -> pytest.LogCaptureFixture:
    folders.warn.cache_clear()
    return caplog


def make(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "the fox"}\n')
    return [folder / name for name in names]


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl"])
def test_linked_folders_and_files_are_read_once(tmp_path, pattern):
    make(tmp_path, "elsewhere/b.jsonl", "in/a.jsonl", "file.jsonl")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/more").symlink_to("linked")
    (tmp_path / "elsewhere/around").symlink_to(tmp_path / "in")
    (tmp_path / "in/z.jsonl").symlink_to(tmp_path / "file.jsonl")
    found = find_files([tmp_path / "in" / pattern])
    assert [path.resolve().name for path in found] == ["a.jsonl", "b.jsonl", "file.jsonl"]


@pytest.mark.parametrize("name", ["dead.jsonl", "dead"])
@pytest.mark.parametrize("pattern", ["", "*", "dead*"])
def test_a_dead_link_is_an_error(tmp_path, name, pattern):
    make(tmp_path, "a.jsonl")
    (tmp_path / name).symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"dead\S* is a link to \S*nowhere.jsonl, which does not"):
        find_files([tmp_path / pattern])
    with pytest.raises(DataError, match="is a link to"):
        find_files([tmp_path / name])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/c.*", ["x/y/c.jsonl"]),
        ("x/**/*.jsonl", ["x/b.jsonl", "x/y/c.jsonl"]),
        ("**", ["a.jsonl", "x/b.jsonl", "x/y/c.jsonl"]),
        ("*/**/y/*", ["x/y/c.jsonl"]),
        ("**/x/**/?.jsonl", ["x/b.jsonl", "x/y/c.jsonl"]),
        ("[ab].jsonl", ["a.jsonl"]),
        ("x/.*", ["x/.d.jsonl"]),
    ],
)
def test_patterns(tmp_path, pattern, names):
    make(tmp_path, "a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/.d.jsonl", ".z/e.jsonl")
    assert find_files([tmp_path / pattern]) == [tmp_path / name for name in names]


def test_a_dead_link_that_is_no_data_does_not_matter(tmp_path):
    found = make(tmp_path, "a.jsonl")
    (tmp_path / "README.md").symlink_to(tmp_path / "nowhere.md")
    (tmp_path / ".dead.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert find_files([tmp_path]) == found


SPLITS = {
    "by file": ("train-00000.jsonl", "validation-00000.jsonl", "test-00000.jsonl"),
    "by word": ("my_train.jsonl", "my_dev.jsonl", "my_test.jsonl"),
    "by folder": ("train/0.jsonl", "val/0.jsonl", "testing/0.jsonl"),
    "by deep folder": ("data/train_sft/0.jsonl", "data/dev/0.jsonl", "data/eval/x/0.jsonl"),
    "unnamed": ("rows.jsonl", "valid.jsonl", "evaluation.jsonl"),
    "words within others": ("latest_contest.jsonl", "dev.jsonl", "Test.jsonl"),
    "a training file's name wins": ("test/train.jsonl", "train/test.jsonl", "train/val.jsonl"),
}


@pytest.mark.parametrize("names", SPLITS.values(), ids=SPLITS)
def test_other_splits_of_a_folder_are_left_out_and_named(tmp_path, said, names):
    train, valid, test = make(tmp_path, *names)
    assert find_files([tmp_path]) == [train]
    assert "not read are 1 validation file and 1 test file; give them as inputs, too" in said.text
    assert find_files([tmp_path, valid, test]) == [train, valid, test]


def test_a_single_other_split_is_read_and_two_are_refused(tmp_path, said):
    files = make(tmp_path, "data/test-0.jsonl", "data/test-1.jsonl")
    assert find_files([tmp_path / "data"]) == files
    assert "it has nothing but 2 test files, which are read" in said.text
    make(tmp_path, "data/dev.jsonl")
    with pytest.raises(DataError, match="has 1 validation file and 2 test files, and no others"):
        find_files([tmp_path / "data"])


def test_the_folder_of_a_split_is_read_in_silence(tmp_path, said):
    files = make(tmp_path, "test/0.jsonl", "test/1.jsonl")
    assert find_files([tmp_path / "test"]) == files
    assert not said.text


def test_a_pattern_that_mixes_splits_is_named(tmp_path, said):
    files = make(tmp_path, "test.jsonl", "train-0.jsonl", "train-1.jsonl")
    assert find_files([tmp_path / "*.jsonl"]) == files
    assert "matches files of several splits, all of which are read: 1 test, 2 train" in said.text
    folders.warn.cache_clear()
    said.clear()
    assert find_files([tmp_path / "train*"]) == files[1:]
    assert not said.text


def save_to_disk(folder: Path, texts: list[str], shards: int = 2) -> None:
    """Writes a folder as `datasets.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        table = pa.table({"text": texts[i::shards]})
        path = str(folder / name)
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    (folder / "cache-1234567890.arrow").write_bytes(b"of an earlier map")


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    texts = ["the fox", "a dog", "jumps", "over"]
    save_to_disk(tmp_path / "in", texts)
    write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts[::2] + texts[1::2]])
    for name in ("in", "in.jsonl"):
        (tmp_path / f"out of {name}").mkdir()
        run(tmp_path / name, tmp_path / f"out of {name}/out")
    assert outputs(tmp_path / "out of in") == outputs(tmp_path / "out of in.jsonl")


def test_a_folder_of_save_to_disk_with_splits(tmp_path, said):
    save_to_disk(tmp_path / "in/train", ["the fox"], 1)
    save_to_disk(tmp_path / "in/test", ["a dog"], 1)
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    name = "data-00000-of-00001.arrow"
    assert find_files([tmp_path / "in"]) == [tmp_path / "in/train" / name]
    assert "not read are 1 test file;" in said.text
    assert find_files([tmp_path / "in/test"]) == [tmp_path / "in/test" / name]


def test_a_folder_of_save_to_disk_that_lacks_a_file(tmp_path):
    save_to_disk(tmp_path / "in", ["the fox", "a dog"])
    (tmp_path / "in/data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="lists data-00001-of-00002"):
        find_files([tmp_path / "in"])
    state = json.loads((tmp_path / "in/state.json").read_text())
    (tmp_path / "in/state.json").write_text(json.dumps({**state, "_indices_data_files": [{}]}))
    with pytest.raises(DataError, match="a selection of rows"):
        find_files([tmp_path / "in"])


def test_descriptions_of_a_data_set_are_no_data(tmp_path):
    [file, *_] = make(tmp_path, "rows.json", "dataset_infos.json", "state.json")
    assert find_files([tmp_path]) == [file]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["_delta_log/0.jsonl", "_delta_log/1.jsonl", "b/_x.jsonl"],
            "not read are _delta_log/0.jsonl and 2 more, since their names begin with _",
        ),
        (["_SUCCESS", "b/_metadata", ".hidden/c.jsonl"], ""),
    ],
)
def test_names_that_begin_with_a_mark_are_passed_over(tmp_path, said, names, sentence):
    [file, *others] = make(tmp_path / "_in", "b/a_.jsonl", *names)
    assert find_files([tmp_path / "_in"]) == [file]
    assert sentence in said.text
    assert bool(said.text) == bool(sentence)
    asked = [path for path in [file, *others] if path.suffix and ".hidden" not in path.parts]
    assert set(find_files([tmp_path / "_in/**/*.jsonl"])) == set(asked)


def test_what_datasets_keeps_of_earlier_maps_is_left_out(tmp_path, said):
    names = ["cache-0a1b2c3d4e5f6071.arrow", "cache-0a1b2c3d4e5f6071_00000_of_00002.arrow"]
    [data, *caches] = make(tmp_path, "set-train.arrow", *names)
    assert find_files([tmp_path]) == [data]
    assert f"not read are {names[0]} and 1 more, which datasets keeps" in said.text
    data.unlink()
    assert find_files([tmp_path]) == caches


@pytest.mark.parametrize("pattern", ["", "*.jsonl", "**/*.json*"])
def test_what_preprocess_wrote_beside_its_input_is_no_input(tmp_path, pattern):
    make(tmp_path, "in.jsonl", "a.stats.json", "b.errors.jsonl")
    (tmp_path / "in.jsonl").write_text('{"text": "the fox"}\n{"text": 5}\n')
    others = find_files([tmp_path / "*.json*"])
    assert len(others) == 3  # no token files lie beside them
    for path in others[:2]:
        path.unlink()
    for _ in range(2):
        run(tmp_path / pattern, tmp_path / "out", on_error="skip")
        assert find_files([tmp_path / pattern]) == [tmp_path / "in.jsonl"]
    assert (tmp_path / "out.errors.jsonl").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    make(tmp_path, "a.jsonl", "locked/b.jsonl")
    (tmp_path / "locked").chmod(0)
    with pytest.raises(DataError, match="locked: Permission denied"):
        find_files([tmp_path])


@pytest.mark.parametrize("name", ["数" * 90 + ".jsonl", "a" * 300])
def test_a_path_that_cannot_be_is_a_sentence(tmp_path, name):
    with pytest.raises(DataError, match=r"can't be found: .*File name too long"):
        find_files([tmp_path / name])
