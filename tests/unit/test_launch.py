"""How the launcher starts ranks, and what it ends with when they fail."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from glm3cli.config.launch import LaunchConfig
from glm3cli.errors import DataError
from glm3cli.parallel.launch import RankError, _end_as, hand_over, run_here


@dataclass
class Failure:
    exitcode: int
    timestamp: float
    error_file_data: dict[str, Any] = field(default_factory=lambda: {"message": "<none>"})
    local_rank: int = 3


def handed_over(monkeypatch, tmp_path, error):
    """Returns what torch's launcher reads of a rank's error."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    hand_over(error)
    return json.loads((tmp_path / "error.json").read_text())


def test_the_rank_with_a_sentence_is_the_cause(monkeypatch, tmp_path):
    """The rank that handed over an error is the cause, even if another failed before it."""
    data = handed_over(monkeypatch, tmp_path, DataError("no such row", "mend it"))
    with pytest.raises(RankError) as caught:
        _end_as([Failure(1, 1.0), Failure(-15, 2.0, data)])
    error = caught.value
    assert (error.message, error.hint, error.exit_code) == ("no such row", "mend it", 3)


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [(1, 1, "rank 3 ended with 1"), (-9, 137, "rank 3 was ended by SIGKILL")],
)
def test_without_a_sentence_the_first_failure_counts(code, expected, said):
    with pytest.raises(RankError) as caught:
        _end_as([Failure(7, 2.0), Failure(code, 1.0)])
    assert (caught.value.exit_code, caught.value.message) == (expected, said)


def test_the_launcher_gets_the_number_of_ranks_and_of_restarts(monkeypatch):
    from torch.distributed.launcher import api

    cluster = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in cluster.items():  # as Kubeflow's PyTorchJob sets them for one machine
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "GLM3_LAUNCHED"):
        monkeypatch.setenv(name, "1")  # whatever is set, the test takes back
    launched = []

    def launch(ranks, _program):
        launched.append(ranks)
        return lambda *_command: {}

    monkeypatch.setattr(api, "elastic_launch", launch)
    assert not run_here(LaunchConfig.parse({"nproc": 3, "max_restarts": 2}))
    assert [(ranks.nproc_per_node, ranks.max_restarts) for ranks in launched] == [(3, 2)]
