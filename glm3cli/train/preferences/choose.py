"""`choose_objective`: the objective of a run by its `--method`."""

from collections.abc import Sequence

from glm3cli.config.training import TrainConfig
from glm3cli.parallel.groups import Grid
from glm3cli.train.objective import NextTokenLoss, Objective
from glm3cli.train.preferences.feedback import FeedbackLoss
from glm3cli.train.preferences.pairs import PairLoss


def choose_objective(config: TrainConfig, grid: Grid, sources: Sequence[str] = ()) -> Objective:
    """Returns what a run with these settings minimises.

    Args:
        config: The settings of the run.
        grid: This rank's place among the parallel groups.
        sources: The names of the data sets, as the batches have them.
    """
    if config.is_paired:
        return PairLoss.of(config, grid)
    if config.method == "kto":
        return FeedbackLoss.of(config, grid)
    return NextTokenLoss.of(config, sources)
