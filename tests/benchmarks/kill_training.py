"""Kills a training at random moments until it has ended, and compares it with one left alone.

python -m tests.benchmarks.kill_training --kills 20 --steps 200
python -m tests.benchmarks.kill_training --kills 10 --steps 100 --method dpo
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Prints both final losses and how often the run was killed."""
    from tests.support.kills import kill_at_random
    from tests.support.preferences import write_rows
    from tests.support.project import make_project, steps
    from tests.support.train_command import options, succeed

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="", help="of finetune; pretrain without it")
    parser.add_argument("--lora-rank", type=int, help="of an adapter that --method trains")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        project = make_project(root)
        changes: dict[str, Any] = {"train_iters": given.steps, "save_interval": 10, "keep_last": 2}
        command_name = "pretrain"
        if given.method:
            command_name = "finetune"
            pairs, feedback = write_rows(project.folder / "task.jsonl", root)
            data = {"sft": project.task, "kto": feedback}.get(given.method, pairs)
            changes |= {"method": given.method, "data": data, "seq_length": 64}
            changes |= {"lora_rank": given.lora_rank}
        succeed(*options(project, root / "whole", command_name, **changes))
        command = options(project, root / "killed", command_name, **changes)
        # So that the run isn't over before the last kill, on a machine of any speed.
        training = sum(record["step_time"] for record in steps(root / "whole"))
        longest = 1.6 * training / given.kills
        metrics = root / "killed/metrics.jsonl"
        kills = kill_at_random(
            command, metrics, kills=given.kills, longest=longest, seed=given.seed
        )
        whole, killed = (steps(root / name)[-1]["loss"] for name in ("whole", "killed"))
        print(f"killed {kills} times; final loss {killed!r}, left alone {whole!r}")
        sys.exit(whole != killed)


if __name__ == "__main__":
    main()
