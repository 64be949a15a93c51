"""What a conversion has written is read back while it goes on, and compared."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from glm3cli.checkpoint import pickles
from glm3cli.checkpoint.convert import read_back
from glm3cli.checkpoint.convert.convert import convert
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import CheckpointError
from glm3cli.host import files
from tests.support.checkpoints import random_weights, write_hf
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

LAYOUTS = ("chatglm", "glm", "mcore", "legacy", "dist")
# The output layer comes last; in no layout its first values stand elsewhere in the files.
FIRST = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
LAST = "transformer.output_layer.weight"


@pytest.fixture
def hf(tmp_path):
    """A model whose tokenizer can be read, as the glm layout needs it."""
    pieces = tiny_tokenizer_folder() / "tokenizer.model"
    return write_hf(tmp_path / "hf", tokenizer=pieces.read_bytes())


def spoil(monkeypatch, name):
    """Has the first write of a tensor change a bit of its first values, and counts such writes."""
    values = random_weights()[name].flatten()[:8].numpy().tobytes()
    spoiled = []

    def write(self, given, place):
        data = bytearray(given)
        found = data.find(values)
        if found >= 0:
            data[found] ^= 1
            spoiled.append(found)
        return original(self, data, place)

    original = files.LargeFile.write
    monkeypatch.setattr(files.LargeFile, "write", write)
    return spoiled


@pytest.mark.parametrize("name", [FIRST, LAST])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_written_wrongly_is_noticed(hf, tmp_path, monkeypatch, layout, name):
    spoiled = spoil(monkeypatch, name)
    options = ConvertOptions(layout=layout, parallel=ModelParallelConfig(), shard_bytes=10_000)
    with pytest.raises(CheckpointError, match=r"new: \S+( of layer 0)? reads back differently"):
        convert(hf, tmp_path / "new", options)
    assert len(spoiled) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_is_read_back_as_soon_as_it_is_written(hf, tmp_path, monkeypatch, layout):
    read, at_the_end = [], []

    def digest(tensor):
        read.append(tensor.shape)
        return original(tensor)

    def finish(self, report):
        self._pool.submit(int).result()  # behind what was asked for before
        at_the_end.append(len(read))
        return original_finish(self, report)

    original, original_finish = read_back.digest, read_back.ReadBack.finish
    monkeypatch.setattr(read_back, "_THREADS", 1)
    monkeypatch.setattr(read_back, "digest", digest)
    monkeypatch.setattr(read_back.ReadBack, "finish", finish)
    tensors = convert(hf, tmp_path / "new", ConvertOptions(layout=layout)).tensors
    assert len(read) == tensors
    assert at_the_end == [tensors]


def test_threads_that_load_files_take_turns(tmp_path):
    """What torch's loader may build is one list for all threads."""
    path = tmp_path / "state.pt"
    torch.save({"state": torch.randn(3).numpy()}, path)
    with ThreadPoolExecutor(1) as pool:
        with pickles._allowing_only(path):
            loading = pool.submit(pickles.load, path)
            with pytest.raises(TimeoutError):
                loading.result(timeout=1)
        assert len(loading.result()["state"]) == 3
