"""Kills `glm3 generate --prompts-file` at random moments until it has ended, and compares results.

python -m tests.benchmarks.kill_prompts_file --kills 10 --lines 3000
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path


def compare(root: Path, model: Path, *, kills: int, lines: int, seed: int) -> tuple[int, bool]:
    """Runs a file of prompts alone and killed; gives the kills, and whether the results are equal.

    Args:
        root: An empty folder to work in.
        model: The folder of the model.
        kills: Number of kills.
        lines: Number of prompts, some of them conversations, and some of them bad.
        seed: Of the prompts and of the moments.
    """
    from tests.support.kills import kill_at_random

    drawn, file = random.Random(seed), root / "prompts.jsonl"
    with file.open("w") as stream:
        for number in range(lines):
            text = f"{number} {'lake ' * drawn.randrange(9)}"
            turns = [{"role": "user", "content": text}]
            forms = [text, {"prompt": text, "max_new_tokens": 3}, {"messages": turns}, {"text": 3}]
            form = drawn.choice(forms[:3]) if number % 50 else forms[3]
            stream.write(json.dumps(form) + "\n" * drawn.randint(1, 2))
    command = ["generate", "--model", model, "--device", "cpu", "--prompts-file", file]
    command += ["--on-error", "skip", "--max-new-tokens", 8, "--resume", "--output"]
    arguments = [sys.executable, "-m", "glm3cli", *map(str, [*command, root / "whole.jsonl"])]
    subprocess.run(arguments, check=True, stderr=subprocess.DEVNULL)
    whole = root / "whole.jsonl"
    # So that the run isn't over before the last kill, on a machine of any speed.
    working = whole.stat().st_mtime - (root / "whole.jsonl.run.json").stat().st_mtime
    killed = root / "killed.jsonl"
    longest = 0.8 * working / kills
    count = kill_at_random([*command, killed], killed, kills=kills, longest=longest, seed=seed)
    return count, killed.read_bytes() == whole.read_bytes()


def main() -> None:
    """Prints how often the run was killed, and whether its results are those of one left alone."""
    from tests.support.project import make_project

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--lines", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_project(Path(folder)).model
        kills, is_equal = compare(
            Path(folder), model, kills=given.kills, lines=given.lines, seed=given.seed
        )
        print(f"killed {kills} times; results {'equal' if is_equal else 'differ'}")
        sys.exit(not is_equal)


if __name__ == "__main__":
    main()
