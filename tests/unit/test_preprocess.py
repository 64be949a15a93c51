"""Files of `preprocess`: golden bytes, every input format, any number of workers."""

import bz2
import gzip
import json
import lzma
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.config.training import TrainConfig
from glm3cli.data.files import find_files
from glm3cli.data.indexed import IndexedWriter
from glm3cli.data.preprocess.readers import tables
from glm3cli.data.preprocess.run import preview
from glm3cli.data.preprocess.workers import encode_all
from glm3cli.data.preprocess.writing.statistics import histogram
from glm3cli.data.preprocess.writing.write import PreprocessProgress
from glm3cli.errors import DataError
from tests.support.preprocess_runs import outputs, run, write_lines
from tests.support.shared import GOLDEN, SHARED, needs_shared
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

TEXTS = ["the quick brown fox", "你好 世界", "over\na lazy dog", "", 'a "quoted", text'] * 7


# ---- golden


@needs_shared
@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("pretrain_parquet", {"handler": "GeneralPretrainHandler"}),
        ("pretrain_parquet", {}),
        ("instruct_parquet_eod", {"handler": "GeneralInstructionHandler", "append_eod": True}),
        ("instruct_parquet_eod", {"handler": "instruction", "append_eod": True}),
    ],
)
def test_files_are_byte_identical_to_modellinks(tmp_path, folder, options):
    source = GOLDEN / "preprocess" / "alpaca54.parquet"
    run(source, tmp_path / "alpaca", tokenizer=SHARED / "chatglm3-6b", **options)
    assert outputs(tmp_path) == outputs(GOLDEN / "preprocess" / folder)


# ---- megatron-core reads and writes the same


@settings(max_examples=25)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(-100, 64797), max_size=5), max_size=3), min_size=1, max_size=8
    )
)
def test_files_are_those_of_megatrons_builder(tmp_path_factory, documents):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("indexed")
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.int32)
    writer = IndexedWriter(folder / "ours")
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int32))
        builder.end_document()
        tokens = np.array([token for sequence in document for token in sequence], dtype=np.int32)
        lengths = np.array([len(sequence) for sequence in document], dtype=np.int32)
        writer.add(tokens, lengths, np.array([len(document)]))
    builder.finalize(str(folder / "theirs.idx"))
    with mock.patch("glm3cli.data.indexed._BLOCK", 2):  # a few sequences are several blocks
        writer.finish()
    for suffix in (".bin", ".idx"):
        ours, theirs = (folder / f"{name}{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    sequences = [sequence for document in documents for sequence in document]
    if sum(map(len, sequences)):
        dataset = IndexedDataset(str(folder / "ours"))
        assert [dataset[i].tolist() for i in range(len(dataset))] == sequences
        assert dataset.document_indices.tolist() == [
            0,
            *np.cumsum([len(document) for document in documents]),
        ]


# ---- formats


def written_in(form: str, path: Path) -> Path:
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    table = pa.Table.from_pylist(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path = path / f"data.{form}"
    if form == "parquet":
        pq.write_table(table, path, row_group_size=4)
    elif form == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    elif form == "file.arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    elif form in ("csv", "tsv"):
        delimiter = "," if form == "csv" else "\t"
        pa.csv.write_csv(table, path, pa.csv.WriteOptions(delimiter=delimiter))
    elif form == "json":
        path.write_text("\ufeff" + json.dumps(rows, indent=1), "utf-8")
    elif form == "lines.json":
        path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n") + b"\n")
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "jsonl.bz2":
        path.write_bytes(bz2.compress(lines[:99]) + bz2.compress(lines[99:]))
    elif form == "jsonl.xz":
        path.write_bytes(lzma.compress(lines))
    elif form == "feather":
        pa.feather.write_feather(table, path)
    elif form == "bytes.parquet":
        fields = {"text": pa.array([row["text"].encode() for row in rows], pa.binary())}
        pq.write_table(pa.table({"id": [row["id"] for row in rows]} | fields), path)
    elif form == "jsonl.zst":
        path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize(
    "form",
    [
        "parquet",
        "bytes.parquet",
        "arrow",
        "file.arrow",
        "feather",
        "csv",
        "tsv",
        "json",
        "lines.json",
        "jsonl.gz",
        "jsonl.zst",
        "jsonl.bz2",
        "jsonl.xz",
    ],
)
def test_every_format_gives_the_same_files(tmp_path, form):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run(written_in("jsonl", tmp_path), tmp_path / "a" / "out")
    summary = run(written_in(form, tmp_path), tmp_path / "b" / "out")
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    assert summary.documents == sum(map(bool, TEXTS))
    assert summary.bytes == sum(len(text.encode()) for text in TEXTS)


def test_lines_of_a_text_file_are_documents(tmp_path):
    (tmp_path / "data.txt").write_bytes("the fox\r\n\n你好\nthe dog".encode())
    summary = run(tmp_path / "data.txt", tmp_path / "out")
    tokens = np.fromfile(tmp_path / "out_text_document.bin", dtype=np.int32)
    tokenizer = tiny_tokenizer()
    expected = [
        token
        for text in ("the fox", "你好", "the dog")
        for token in [*tokenizer.prefix, *tokenizer.encode(text)]
    ]
    assert tokens.tolist() == expected
    assert (summary.documents, summary.tokens) == (3, len(expected))


def test_several_keys_make_several_files(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"title": "the fox", "text": "a lazy dog"}])
    summary = run(source, tmp_path / "out", json_keys=["title,text"])
    assert sorted(outputs(tmp_path)) == [
        f"out_{key}_document.{suffix}" for key in ("text", "title") for suffix in ("bin", "idx")
    ]
    assert [Path(name).suffix for name in summary.files] == [".bin", ".bin", ".idx", ".idx"]


def test_folders_and_globs_are_read_in_order(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write_lines(folder / name, [{"text": name}])
    (folder / "README.txt").write_text("not data")
    (folder / ".hidden.jsonl").write_text("not data")
    files = [folder / name for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl")]
    assert find_files([folder]) == files
    assert find_files([folder / "*.jsonl"]) == files[:2]
    assert find_files([folder / "**" / "c.*", folder / "a.jsonl"]) == [files[2], files[0]]


# ---- workers


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory) -> Path:
    """More than a megabyte, so that it makes several chunks."""
    rng = random.Random(1)
    words = " ".join(TEXTS).split()
    rows = [{"text": " ".join(rng.choices(words, k=rng.randint(1, 90)))} for _ in range(5000)]
    return write_lines(tmp_path_factory.mktemp("many") / "in.jsonl", rows)


@pytest.mark.parametrize("workers", [2, 7])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, many_rows, workers):
    (tmp_path / "one").mkdir()
    (tmp_path / "more").mkdir()
    seen: list[tuple[int, float]] = []

    def report(progress: PreprocessProgress) -> None:
        seen.append((progress.counts.documents, progress.done))

    one = run(many_rows, tmp_path / "one" / "out")
    more = run(many_rows, tmp_path / "more" / "out", report, workers=workers)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "more")
    assert (one.documents, one.tokens) == (more.documents, more.tokens) == (5000, one.tokens)
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (5000, 1.0)


def test_a_killed_worker_ends_the_run_with_a_sentence(tmp_path, many_rows):
    others = {process.pid for process in multiprocessing.active_children()}

    def workers() -> list:
        return [child for child in multiprocessing.active_children() if child.pid not in others]

    def report(progress: PreprocessProgress) -> None:
        for process in workers():
            process.kill()

    with pytest.raises(DataError, match="a worker process was killed"):
        run([many_rows] * 5, tmp_path / "out", report, workers=2)
    assert not list(tmp_path.iterdir())
    assert not workers()


def test_a_fault_in_a_worker_is_not_taken_for_want_of_memory(tmp_path):
    config = PreprocessConfig.parse(
        {
            "input": [tmp_path],
            "tokenizer": tiny_tokenizer_folder(),
            "output_prefix": tmp_path / "out",
            "workers": 2,
        }
    )
    no_chunks: Any = iter(["no chunk"] * 3)
    with pytest.raises(DataError, match="a worker process ended with 1"):
        list(encode_all(config, tiny_tokenizer(), no_chunks))


def test_workers_do_not_import_torch():
    code = "import sys, glm3cli.data.preprocess.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_shared
@pytest.mark.parametrize(
    ("name", "options", "documents"),
    [
        ("alpaca_en_1k.parquet", {"handler": "instruction"}, 999),
        ("alpaca_zh_1k.json", {"handler": "instruction", "template": "chatglm3"}, 1000),
        ("alpaca_zh_1k.json", {"handler": "chat"}, 1000),
        ("toolcall_zh.json", {"handler": "chat"}, 300),
        ("c4.jsonl", {}, 300),
        ("wiki.txt", {}, 30),
    ],
)
def test_real_data(tmp_path, name, options, documents):
    tokenizer = SHARED / "chatglm3-6b"
    summary = run(SHARED / "data" / name, tmp_path / "out", tokenizer=tokenizer, **options)
    assert (summary.documents, summary.skipped) == (documents, 0)
    files = [Path(file) for file in summary.files if file.endswith(".bin")]
    assert {file.stat().st_size for file in files} == {4 * summary.tokens}


# ---- the sequence length, bad rows, previews


def test_samples_are_cut_and_hopeless_ones_counted(tmp_path):
    rows = [
        {"instruction": "the fox", "output": "the lazy dog " * 50},
        {"instruction": "the fox " * 50, "output": "over"},
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    summary = run(source, tmp_path / "out", handler="chat", seq_length=32)
    assert (summary.documents, summary.tokens, summary.skipped) == (1, 32, 1)
    labels = np.fromfile(tmp_path / "out_packed_labels_document.bin", dtype=np.int32)
    assert labels[-1] == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_row_groups_of_any_size_give_the_same_files(tmp_path, many_rows, workers, monkeypatch):
    rows = [json.loads(line) for line in many_rows.read_text("utf-8").splitlines()]
    run(many_rows, tmp_path / "lines")
    table = pa.Table.from_pylist([{"id": i, **row} for i, row in enumerate(rows)])
    monkeypatch.setattr(tables, "_GROUP_BYTES", 100_000)  # between those of the two files
    for name, size in (("small", 300), ("large", 2500)):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=size)
        run(tmp_path / f"{name}.parquet", tmp_path / name, workers=workers)
        for kind in ("bin", "idx"):
            files = [tmp_path / f"{stem}_text_document.{kind}" for stem in (name, "lines")]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_a_very_long_line(tmp_path):
    rows = [{"text": "a dog"}, {"text": "the fox 你好 " * 500_000}, {"text": "a dog"}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    summary = run(source, tmp_path / "out", workers=2)
    tokens = np.fromfile(tmp_path / "out_text_document.bin", dtype=np.int32)
    one = len(tiny_tokenizer().encode("a dog")) + 2
    assert summary.documents == 3
    assert (tokens[:one] == tokens[-one:]).all()
    again = tiny_tokenizer().decode(tokens[one + 2 : -one].tolist())
    assert again == rows[1]["text"]


def test_statistics(tmp_path):
    rows = [
        {"instruction": "the fox", "output": "dog"},
        {"instruction": "the fox", "output": "the lazy dog " * 50},
        {"instruction": "the fox " * 50, "output": "over"},
        {"instruction": 5},
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    summary = run(source, tmp_path / "out", handler="chat", seq_length=32, on_error="skip")
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    assert summary.stats == str(tmp_path / "out.stats.json")
    counted = {name: stats[name] for name in ("documents", "bad_rows", "dropped", "truncated")}
    assert counted == {"documents": 2, "bad_rows": 1, "dropped": 1, "truncated": 1}
    assert stats["empty"] == 0
    lengths = np.fromfile(tmp_path / "out_packed_input_ids_document.bin", dtype=np.int32)
    assert stats["tokens"] == len(lengths) == summary.tokens
    first = stats["tokens"] - 32
    assert 8 <= first < 16
    histogram = {"8-15": 1, "32-63": 1}
    assert stats["length_histogram"] == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), histogram
    )
    assert stats["bytes"] == sum(len(r["instruction"] + r["output"]) for r in rows[:3])
    assert stats["tokens_per_byte"] == stats["tokens"] / stats["bytes"]
    assert stats["job"]["settings"]["seq_length"] == 32
    assert stats["job"]["inputs"][0][0] == str(source)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], {}),
        ([0, 1, 1, 2, 3, 4, 7, 8], {"0": 1, "1-1": 2, "2-3": 2, "4-7": 2, "8-15": 1}),
        ([8191, 8192], {"4096-8191": 1, "8192-16383": 1}),
    ],
)
def test_a_histogram_counts_by_powers_of_two(lengths, expected):
    assert histogram(np.array(lengths, dtype=np.int32)) == expected


def test_a_preview_shows_ids_and_labels_and_writes_nothing(tmp_path):
    rows = [{"instruction": "the fox", "output": f"dog {i}"} for i in range(5)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    config = PreprocessConfig.parse(
        {
            "input": [source],
            "tokenizer": tiny_tokenizer_folder(),
            "output_prefix": tmp_path / "out",
            "handler": "chat",
            "preview": 2,
        }
    )
    shown = list(preview(config))
    assert [sample.where for sample in shown] == [f"{source}:1", f"{source}:2"]
    tokenizer = tiny_tokenizer()
    name, token, label = shown[0].tokens[2]
    assert (name, token, label) == ("<|user|>", tokenizer.special("<|user|>"), -100)
    assert shown[0].tokens[-1][1:] == (2, 2)
    assert list(tmp_path.iterdir()) == [source]


def test_indices_are_by_default_those_of_a_default_training():
    for name in ("global_batch_size", "split", "seed", "eval_interval", "eval_iters"):
        fields = (PreprocessConfig.model_fields[name], TrainConfig.model_fields[name])
        assert fields[0].default == fields[1].default, name
