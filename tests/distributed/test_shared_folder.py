"""Ranks whose --save isn't the same folder learn of it before they train."""

from pathlib import Path

import pytest

from glm3cli.errors import CheckpointError
from tests.support.ranks import RankPool
from tests.support.tiny import TINY, train_config

pytestmark = pytest.mark.dist


def check(folders: list[Path]) -> str | None:
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.store import Store

    with open_grid(train_config()) as grid:
        run = folders[grid.rank]
        try:
            Store(run, TINY, run, run, None, 0, False).check_shared(grid)
        except CheckpointError as error:
            return error.message
    return None


def test_another_folder_is_named(ranks: RankPool, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    found = ranks.run(2, check, [tmp_path / "one", tmp_path / "two"])
    for message in found:
        assert message is not None
        assert "rank(s) 1 have another folder of that name than rank 0" in message
    assert ranks.run(2, check, [tmp_path / "one"] * 2) == [None, None]
    assert not list((tmp_path / "one").iterdir())
