"""Makes small wrong changes to the program, one at a time, and tells which the tests notice.

The changes are in `mutations.toml`: a file, a piece of it that occurs once, what stands there
instead, and the tests that should notice it. They are made in a copy of the checkout, never in the
checkout itself. The tests of a change that was noticed have failed; those of a survivor have
passed, and a test is missing, or the entry has a `reason` why no test can notice it.

    python -m tests.benchmarks.mutations --only checkpoint/
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".toml")
_COPIED = ("glm3cli", "tests", "pyproject.toml", "README.md")
_PASSED, _FAILED, _INTERRUPTED = 0, 1, 2  # exit codes of pytest; the last if a file can't be read
_TIMEOUT = 600  # seconds; a change that makes the program hang is noticed, too


@dataclass(frozen=True)
class Mutation:
    """One wrong change.

    Attributes:
        file: The file, below glm3cli/.
        old: A piece of it that occurs once.
        new: What stands there instead.
        tests: The test files, or tests, that should notice it, as pytest takes them.
        reason: Why no test can notice it; "" where one should.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""

    def __str__(self) -> str:
        words = f"{' '.join(self.old.split())} -> {' '.join(self.new.split()) or '(nothing)'}"
        return f"{self.file}: {words}"


def read_table() -> list[Mutation]:
    """Returns all changes of the table."""
    entries = tomllib.loads(TABLE.read_text("utf-8"))["mutation"]
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def stale(mutations: Sequence[Mutation]) -> list[str]:
    """Returns a sentence about each change that no longer fits the program or its tests."""
    problems = []
    for one in mutations:
        path = ROOT / "glm3cli" / one.file
        count = path.read_text("utf-8").count(one.old) if path.is_file() else 0
        if count != 1 or one.old == one.new:
            problems.append(f"{one}: the piece occurs {count} times in its file")
        absent = [test for test in one.tests if not (ROOT / test.split("::")[0]).is_file()]
        problems += [f"{one}: {test} does not exist" for test in absent]
    return problems


def copy_checkout(folder: Path) -> Path:
    """Copies what the tests need into `folder`; the reference data beside it is linked."""
    copy = folder / "glm3"
    copy.mkdir()
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy / name)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())
    return copy


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Runs tests in the copy; returns pytest's exit code and the end of what it has written."""
    words = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "", "--no-header", *tests]
    command = [sys.executable, "-B", "-m", "pytest", *words]
    with subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, text=True) as process:
        try:
            said, _ = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()  # else what the tests have started would run on
            return _FAILED, "it hangs"
    return process.returncode, said[-2000:]


def try_out(copy: Path, mutation: Mutation) -> tuple[str, float, str]:
    """Makes a change in the copy, runs its tests, and takes the change back.

    Returns:
        `noticed`, `survived`, or `broken` where pytest could not run the tests; the seconds that it
        took; and the end of what pytest has written.
    """
    path, started = copy / "glm3cli" / mutation.file, time.perf_counter()
    before = path.read_text("utf-8")
    path.write_text(before.replace(mutation.old, mutation.new), "utf-8")
    try:
        code, text = run_tests(copy, mutation.tests)
    finally:
        path.write_text(before, "utf-8")
    found = {_PASSED: "survived", _FAILED: "noticed", _INTERRUPTED: "noticed"}.get(code, "broken")
    return found, time.perf_counter() - started, text


def main() -> int:
    """Tries the changes, prints a line for each and a table, and returns 1 if too many survive."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="only changes whose line has this text")
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts")
    parser.add_argument("--check", action="store_true", help="only look whether the table fits")
    parser.add_argument("--baseline", action="store_true", help="first run the tests unchanged")
    options = parser.parse_args()
    mutations = [one for one in read_table() if options.only in str(one)]
    part, parts = map(int, options.part.split("/"))
    mutations = mutations[part - 1 :: parts]
    problems = [(one, problem) for one in mutations for problem in stale([one])]
    for _, problem in problems:
        print(problem)
    if options.check:
        print(f"{len(mutations)} changes, {len(problems)} don't fit")
        return bool(problems)
    unfit = {one for one, _ in problems}
    mutations = [one for one in mutations if one not in unfit]
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="glm3-mutations-") as folder:
        copy = copy_checkout(Path(folder))
        if options.baseline:
            tests = sorted({test for one in mutations for test in one.tests})
            code, text = run_tests(copy, tests)
            if code != _PASSED:
                print(f"the tests fail without any change:\n{text}")
                return 1
        for one in mutations:
            found, seconds, text = try_out(copy, one)
            outcome = "explained" if found == "survived" and one.reason else found
            counts[one.file.split("/")[0], outcome] += 1
            print(f"{outcome:9} {seconds:5.0f} s  {one}", flush=True)
            if found == "broken":
                print(text)
    return report(counts, len(unfit))


def report(counts: Counter[tuple[str, str]], num_unfit: int) -> int:
    """Prints how many changes of each room were noticed; returns 1 if below 95 %.

    Args:
        counts: The number of changes by their room and what came of them.
        num_unfit: The number of changes that don't fit the program any more, and weren't tried.
    """
    outcomes = ("noticed", "explained", "survived", "broken")
    rooms = sorted({room for room, _ in counts})
    print(f"\n{'room':12}" + "".join(f"{name:>11}" for name in outcomes))
    for room in rooms:
        print(f"{room:12}" + "".join(f"{counts[room, name]:11}" for name in outcomes))
    total = {name: sum(counts[room, name] for room in rooms) for name in outcomes}
    print(f"{'all':12}" + "".join(f"{total[name]:11}" for name in outcomes))
    tried = sum(total.values()) - total["explained"]
    print(f"noticed: {total['noticed']} of {tried} ({total['noticed'] / max(tried, 1):.1%})")
    if num_unfit:
        print(f"{num_unfit} CHANGES DON'T FIT THE PROGRAM and were not tried: mend the table")
    return int(num_unfit > 0 or total["noticed"] < 0.95 * tried)


if __name__ == "__main__":
    sys.exit(main())
