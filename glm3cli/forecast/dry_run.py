"""`dry_run`: the resolved plan of a training as text, from shapes alone; nothing is written."""

from collections.abc import Iterator

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.data.kinds import DataKind
from glm3cli.plan.describe import advise
from glm3cli.plan.describe import describe as describe_plan
from glm3cli.train.prepare import prepare
from glm3cli.train.start import dry_data


def dry_run(config: TrainConfig, kind: DataKind) -> Iterator[str]:
    """Yields the paragraphs of the plan, each as soon as it is known.

    Raises:
        Glm3Error: As for the same training without --dry-run.
    """
    prepared, data = dry_data(prepare(config, kind))
    config = prepared.config
    if prepared.choice:
        yield prepared.choice
    yield f"{describe_plan(config, prepared.model)}\n{data}"
    if config.device_memory or config.chip:
        yield f"{advise(config, prepared.model)}\n{_forecast(config, prepared.model)}"


def _forecast(config: TrainConfig, model: ModelConfig) -> str:
    """Predicts the step on devices that aren't here, from the operators that it would run."""
    from glm3cli.device import select
    from glm3cli.device.catalog import find_chip

    # Megatron-core can be imported only once a device is active.
    select("cpu").activate()
    from glm3cli.forecast.forecast import describe, forecast

    return describe(forecast(config, model, find_chip(config.chip)))
