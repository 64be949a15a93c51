"""What a reference thinks of answers is the same at all parallel sizes, on one disk or several.

Tolerance 1e-4 of log-probabilities around -50: fp32 sums in another order.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.kinds import kind_of
from glm3cli.data.preprocess.run import preprocess
from glm3cli.errors import DataError, StoppedError
from tests.support.ranks import RankPool
from tests.support.tiny import TINY, train_config
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

pytestmark = pytest.mark.dist
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "seven", "wizards", "box")
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {"micro_batch_size": 2}),
    "cp2": (2, {"cp": 2}),
}
Table = tuple[np.ndarray, np.ndarray]


class Stop:
    """A request to stop that comes after some global batches; never, if that is None."""

    def __init__(self, after: int | None) -> None:
        self.left = after

    def is_ending(self) -> bool:
        if self.left is not None:
            self.left -= 1
        return self.left is not None and self.left < 0


def look(
    method: str, prefix: str, folders: list[Path], options: dict[str, Any], after: int | None = None
) -> tuple[Table, list[str]]:
    """Lets the starting weights look at all samples; runs on the pool.

    Gives what they think of the answers by their segment, and what was said.
    """
    from functools import partial

    from glm3cli.data.prefixes import read_blend
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.preferences.reference import Reference
    from glm3cli.train.prepare import prepare
    from glm3cli.train.setup import build_training, starting_weights

    config = train_config(
        **{"method": method, "data": [prefix], "tokenizer": tiny_tokenizer_folder(), **options}
    )
    with open_grid(config) as grid:
        config = config.model_copy(update={"data_cache": folders[grid.rank]})
        prepared = prepare(config, kind_of(config.method))
        blend, said = read_blend(config.data), []
        stop: Any = Stop(after)
        reference = Reference(
            prepared, blend, partial(starting_weights, prepared), stop, said.append
        )
        parts = build_training(prepared, blend, grid, with_weights=False, reference=reference)
        dataset: Any = parts.train.dataset
        return (dataset.references, dataset.mismatched_references), said


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Preprocessed pairs and feedback, by the method."""
    folder, found = tmp_path_factory.mktemp("data"), {}
    pairs, feedback = [], []
    for number in range(12):
        words = [WORDS[(number + place) % len(WORDS)] for place in range(len(WORDS))]
        chosen, rejected = (" ".join(words[:size]) for size in (1 + number % 4, 5 + number % 3))
        pairs.append({"prompt": words[-1], "chosen": chosen, "rejected": rejected})
        is_liked = number % 3 > 0
        feedback.append({"prompt": words[-1], "completion": chosen, "label": is_liked})
    for method, handler, rows in (("dpo", "preference", pairs), ("kto", "feedback", feedback)):
        source = folder / f"{handler}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"input": [source], "tokenizer": tiny_tokenizer_folder(), "handler": handler}
        options |= {"output_prefix": folder / handler, "workers": 1}
        preprocess(PreprocessConfig.parse(options))
        found[method] = str(folder / handler)
    return found


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(TINY.model_copy(update={"padded_vocab_size": 512}).to_hf()))
    return {
        "shape": str(shape),
        "save": tmp_path / "run",
        "split": "1,0,0",
        "train_iters": 3,
        "lr_warmup_iters": 0,
        "seq_length": 64,
    }


@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("sizes", SIZES)
def test_parallel_sizes_agree(
    ranks: RankPool, prefixes: dict[str, str], options: Any, tmp_path: Path, method: str, sizes: str
) -> None:
    world_size, changes = SIZES[sizes]
    prefix = prefixes[method]
    [((own, mismatched), _)] = ranks.run(1, look, method, prefix, [tmp_path / "one"], options)
    assert own.shape[0] == 12
    assert np.isfinite(own).sum() == (24 if method == "dpo" else 12)
    assert own[np.isfinite(own)].max() < -5
    folders = [tmp_path / "several"] * 2
    for (found, others), _ in ranks.run(
        world_size, look, method, prefix, folders, options | changes
    ):
        np.testing.assert_allclose(found, own, rtol=1e-4)
        if method == "kto":
            assert np.isfinite(mismatched).sum() == 12
            assert not np.isclose(mismatched, own[:, :1], rtol=1e-2).all()
            np.testing.assert_allclose(others, mismatched, rtol=1e-4)


def test_machines_that_share_no_disk_tell_each_other(
    ranks: RankPool, prefixes: dict[str, str], options: Any, tmp_path: Path
) -> None:
    """One of them has lost what it knew, and the other one hasn't."""
    folders = [tmp_path / "first", tmp_path / "second"]
    (first, said), _ = ranks.run(2, look, "dpo", prefixes["dpo"], folders, options)
    assert any("the reference looks at 12 samples" in line for line in said)
    [kept] = (tmp_path / "second").glob("*.npz")
    [lost] = (tmp_path / "first").glob("*.npz")
    assert kept.name == lost.name
    lost.unlink()
    for (found, _), said in ranks.run(2, look, "dpo", prefixes["dpo"], folders, options):
        assert not said
        np.testing.assert_array_equal(found, first[0])
    assert lost.is_file()


def stopped(*arguments: Any) -> str:
    with pytest.raises(StoppedError) as error:
        look(*arguments)
    return str(error.value)


def test_what_was_seen_before_a_stop_is_kept(
    ranks: RankPool, prefixes: dict[str, str], options: Any, tmp_path: Path
) -> None:
    arguments = ("dpo", prefixes["dpo"], [tmp_path / "cache"], options | {"global_batch_size": 4})
    [whole, _] = ranks.run(1, look, *arguments[:2], [tmp_path / "whole"], arguments[3])[0]
    [sentence] = ranks.run(1, stopped, *arguments, 1)
    assert "it has seen 16 answers, which are kept" in sentence
    [(found, said)] = ranks.run(1, look, *arguments)
    assert "the reference looks at 4 samples" in said[0]
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-4)


def unwritable(*arguments: Any) -> str:
    with pytest.raises(DataError) as error:
        look(*arguments)
    return f"{error.value} {error.value.hint}"


def test_a_cache_that_can_not_be_written_is_named(
    ranks: RankPool, prefixes: dict[str, str], options: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    for sentence in ranks.run(2, unwritable, "dpo", prefixes["dpo"], [folder] * 2, options):
        assert f"can't write into {folder}" in sentence
        assert "--data-cache" in sentence
