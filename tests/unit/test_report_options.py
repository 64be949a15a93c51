"""The options that say what a run reports, and to which tools."""

import subprocess
import sys

import pytest

from glm3cli.errors import ConfigError
from glm3cli.train.report.reporters import check_installed
from tests.support.tiny import TINY, train_config


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """Removes what would say that torchrun has started this process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("given", "tools"),
    [
        (["none"], []),
        (["wandb"], ["wandb"]),
        (["swanlab", "tensorboard", "swanlab"], ["tensorboard", "swanlab"]),
    ],
)
def test_tools_are_named_once(given, tools):
    assert train_config(report_to=given).tools == tools
    assert train_config().tools == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["mlflow"], "mlflow is not one of none, tensorboard, wandb, swanlab"),
        (["none", "wandb"], "give none, or the names of tools, not both"),
    ],
)
def test_other_tools_are_refused(given, said):
    with pytest.raises(ConfigError, match=said) as caught:
        train_config(report_to=given)
    assert "--report-to" in caught.value.message


def test_steps_to_profile_are_counted_from_one_and_both_ends_are_in():
    assert list(train_config(profile="3:5").profile_steps) == [3, 4, 5]
    assert list(train_config(profile="4:4").profile_steps) == [4]
    assert not train_config().profile_steps


@pytest.mark.parametrize("given", ["3", "a:b", "5:3", "0:2", "-1:2", "1:2:3", "3:", "", "1.5:2"])
def test_other_steps_are_refused(given):
    with pytest.raises(ConfigError, match="give START:STOP") as caught:
        train_config(profile=given)
    assert "--profile" in caught.value.message


def test_steps_beyond_the_run_are_refused():
    train_config(profile="19:20").check_sizes(TINY)
    with pytest.raises(ConfigError, match="--profile 19:21 goes beyond --train-iters 20"):
        train_config(profile="19:21").check_sizes(TINY)


@pytest.mark.parametrize("given", [0.0, -1.0])
def test_a_peak_is_above_zero(given):
    with pytest.raises(ConfigError, match="--peak-tflops"):
        train_config(peak_tflops=given)


def test_a_tool_that_is_not_installed_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb" or None)
    check_installed(["wandb"])
    with pytest.raises(ConfigError) as caught:
        check_installed(["tensorboard", "wandb", "swanlab"])
    assert caught.value.message == "--report-to tensorboard: its package isn't installed"
    assert caught.value.hint == "pip install tensorboard swanlab"


def test_looking_for_tools_imports_none_of_them():
    code = (
        "import sys; from glm3cli.train.report.reporters import check_installed;"
        "check_installed([]);"
        "print({'torch', 'wandb', 'swanlab', 'tensorboard'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
