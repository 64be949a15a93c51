"""The text of `--dry-run` for devices that aren't here, and the refusal of runs that don't fit."""

from pathlib import Path

import pytest
import yaml

from glm3cli.device.cpu import CpuDevice
from tests.support.project import Project, call, steps
from tests.support.train_command import options, succeed


def test_a_plan_for_eight_cards_on_this_machine(project: Project, tmp_path: Path) -> None:
    changes = {"dry_run": True, "device_memory": "64GB", "world_size": 8, "global_batch_size": 16}
    ended = succeed(*options(project, tmp_path / "run", **changes))
    assert "ranks: 8 = tp 1 x pp 1 x dp 8" in ended.out
    assert "layouts for 910B with 59.60 GiB" in ended.out
    assert "tokens/s/device" in ended.out
    assert "does not fit" not in ended.out
    assert not list(tmp_path.iterdir())


def test_a_plan_that_does_not_fit_is_reported_and_is_no_error(
    project: Project, tmp_path: Path
) -> None:
    changes = {"dry_run": True, "device_memory": "1MB"}
    ended = succeed(*options(project, tmp_path / "run", **changes))
    assert "does not fit: --tp 1 --pp 1 --micro-batch-size 2 needs" in ended.out
    assert "layouts fits; the smallest, --tp" in ended.out


def test_a_run_that_does_not_fit_is_not_started(project: Project, tmp_path: Path) -> None:
    ended = call(*options(project, tmp_path / "run", device_memory="1MB"))
    assert ended.code == 2
    assert "error: --tp 1 --pp 1 --micro-batch-size 2 needs" in ended.err
    assert "hint: none of" in ended.err
    assert not list(tmp_path.iterdir())


def test_a_run_that_the_device_here_cannot_hold_is_not_started(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuDevice, "memory", lambda _: 10**6)
    ended = call(*options(project, tmp_path / "run"))
    assert ended.code == 2
    assert "error: --tp 1 --pp 1 --micro-batch-size 2 needs" in ended.err
    assert ended.err.rstrip().endswith("; --device-memory overrules what the device says")
    assert not list(tmp_path.iterdir())
    succeed(*options(project, tmp_path / "run", train_iters=1, device_memory="1GB"))


def test_planned_ranks_are_not_started(project: Project, tmp_path: Path) -> None:
    ended = call(*options(project, tmp_path / "run", world_size=8))
    assert ended.code == 2
    assert "error: --world-size is for --dry-run" in ended.err


def test_a_chip_has_speed_and_memory(project: Project, tmp_path: Path) -> None:
    ended = succeed(*options(project, tmp_path / "run", dry_run=True, chip="A100"))
    assert "layouts for A100 with 80.00 GiB" in ended.out
    assert "step on A100, predicted from its operators: " in ended.out
    assert "operators of the busiest stage" in ended.out
    ended = call(*options(project, tmp_path / "run", dry_run=True, chip="Z80"))
    assert ended.code == 2
    assert "error: --chip Z80 is not known" in ended.err


def test_a_device_of_ones_own_is_a_file(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[mine]\nkind = "npu"\npeak_tflops = 1.0\nmemory_gib = 2\nmemory_bandwidth = 1e9\n'
        "link_bandwidth = 1e9\nnum_links = 1\nnetwork_bandwidth = 1e9\n"
    )
    ended = succeed(*options(project, tmp_path / "run", dry_run=True, chip=str(file), world_size=2))
    assert "layouts for mine with 2.00 GiB" in ended.out
    assert "step on mine, predicted from its operators: " in ended.out
    assert "npu.npu_fusion_attention" in ended.out


def test_a_layout_is_chosen_said_and_written_down(project: Project, tmp_path: Path) -> None:
    run, chosen = tmp_path / "run", {"auto_layout": True, "micro_batch_size": 1, "train_iters": 2}
    given = options(project, run, **chosen, chip="CPU", global_batch_size=8)
    ended = succeed(*given)
    assert "--auto-layout takes --tp 1 --pp 1 --micro-batch-size 8: of 4 layouts" in ended.err
    settings = yaml.safe_load((run / "run.yaml").read_text())
    assert settings["micro_batch_size"] == 8
    assert settings["auto_layout"] is False
    assert "chip" not in settings
    # The file alone goes on with the same plan.
    ended = succeed("pretrain", "--config", run / "run.yaml", "--train-iters", 3)
    assert "--auto-layout" not in ended.err
    assert steps(run)[-1]["iteration"] == 3
    changes = {"dry_run": True, "auto_layout": True, "chip": "910B", "world_size": 4}
    ended = succeed(*options(project, tmp_path / "other", **changes))
    assert ended.out.startswith("--auto-layout takes --tp ")
    assert "4 x 910B with 64.00 GiB" in ended.out
    assert "step on 910B, predicted from its operators: " in ended.out
