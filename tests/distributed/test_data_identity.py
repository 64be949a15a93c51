"""Ranks whose data differs say so before they train."""

import shutil
from pathlib import Path

import pytest

from glm3cli.data.kinds import ANSWERS, INSTRUCTION_KEYS, TEXT, DataKind, instruction_file
from glm3cli.data.prefixes import Blend, data_fingerprint
from tests.support.ranks import RankPool
from tests.support.samples import write_documents, write_instructions
from tests.support.tiny import train_config


def check(blends: list[Blend], kind: DataKind) -> str:
    """Returns the error that this rank gets for its blend, or "" for none."""
    import torch.distributed as dist

    from glm3cli.data.samples.identity import check_same_data
    from glm3cli.errors import DataError
    from glm3cli.parallel.groups import open_grid

    with open_grid(train_config()):
        try:
            check_same_data(blends[dist.get_rank()], kind)
        except DataError as error:
            return error.message
        return ""


@pytest.mark.dist
def test_equal_files_in_other_places_are_the_same(ranks: RankPool, tmp_path: Path) -> None:
    blends = []
    for node in ("one", "two"):
        (tmp_path / node).mkdir()
        write_documents(tmp_path / node / "a", [[7] * 10] * 10)
        blends.append(Blend((str(tmp_path / node / "a"),), None))
    assert ranks.run(2, check, blends, TEXT) == ["", ""]


@pytest.mark.dist
def test_other_files_are_told_with_their_ranks(ranks: RankPool, tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[7] * 10] * 10)
    write_documents(tmp_path / "b", [[7] * 9 + [8]] * 10)
    a, b = (Blend((str(tmp_path / name),), None) for name in "ab")
    for told in ranks.run(3, check, [a, b, a], TEXT):
        assert "is not the same on all ranks: ranks 0, 2 have " in told
        assert "; ranks 1 have " in told


@pytest.mark.dist
def test_more_data_on_one_rank(ranks: RankPool, tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[7] * 10] * 10)
    name = str(tmp_path / "a")
    blends = [Blend((name,), None), Blend((name, name), None)]
    for told in ranks.run(2, check, blends, TEXT):
        assert told.startswith(
            "the ranks were not given the same number of --data: ranks 0 have 1 on "
        )


def test_every_file_of_instructions_counts(tmp_path: Path) -> None:
    write_instructions(tmp_path / "a", [([1], [2, 3])] * 10)
    before = data_fingerprint(str(tmp_path / "a"), ANSWERS)
    for key in INSTRUCTION_KEYS:
        for suffix in (".bin", ".idx"):
            file = Path(instruction_file(str(tmp_path / "a"), key) + suffix)
            shutil.copy2(file, tmp_path / "kept")
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")
            assert data_fingerprint(str(tmp_path / "a"), ANSWERS) != before
            shutil.move(tmp_path / "kept", file)
    assert data_fingerprint(str(tmp_path / "a"), ANSWERS) == before
