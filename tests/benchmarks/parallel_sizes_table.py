"""How far training at all parallel sizes is from one rank, as a table in Markdown.

    python -m tests.benchmarks.parallel_sizes_table

trains the tiny model of the tests for ten steps at all parallel sizes of
tests/distributed/test_parallel_sizes.py, in fp32 on gloo ranks of this machine. Losses and gradient
norms: the greatest relative difference of all steps. Weights at the end: of each, the norm of the
difference over the norm of what training has changed, the greatest of all weights; and the greatest
difference of an element.
"""

from collections.abc import Sequence
from contextlib import closing

from tests.distributed.test_parallel_sizes import PARALLEL_SIZES, STEPS, distance
from tests.support.ranks import RankPool
from tests.support.training import Trained, train_steps


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """The greatest relative difference of two runs of numbers."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def row(layout: str, found: Sequence[Trained], one_rank: Trained) -> str:
    """A line of the table."""
    loss = max(relative(rank.losses, one_rank.losses) for rank in found)
    norm = max(relative(rank.grad_norms, one_rank.grad_norms) for rank in found)
    weights = distance(found, one_rank)
    numbers = (loss, norm, weights.relative, weights.absolute)
    return f"| {layout} | {len(found)} | " + " | ".join(f"{x:.1e}" for x in numbers) + " |"


def main() -> None:
    """Prints the table."""
    print("| layout | ranks | loss | gradient norm | weights | weights, absolute |")
    print("|---|---:|---:|---:|---:|---:|")
    with closing(RankPool()) as pool:
        [one_rank] = pool.run(1, train_steps, {}, 0, STEPS)
        for layout, (world_size, options) in PARALLEL_SIZES.items():
            found = pool.run(world_size, train_steps, options, 0, STEPS)
            print(row(layout, found, one_rank), flush=True)


if __name__ == "__main__":
    main()
