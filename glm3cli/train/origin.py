"""`Origin`: what a run is made of, as its checkpoints note it, and what changes when it goes on.

A run whose command, model or data changed is another run: its optimizer, its schedule and its
position in the data belong to something else. It is refused unless `--allow-changed` says that it
may go on. Other settings may change, and are named.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm3cli.checkpoint.files.manifest import read_manifest
from glm3cli.checkpoint.locate import WEIGHT_SUFFIXES, Location
from glm3cli.config.launch import PANEL as LAUNCH
from glm3cli.config.model import ModelConfig
from glm3cli.config.options.lora import LoraOptions
from glm3cli.config.options.planning import PANEL as PLANNING
from glm3cli.config.options.reporting import REPORT
from glm3cli.config.options.run import IDENTITY, RUN
from glm3cli.config.parallel import PANEL as PARALLEL
from glm3cli.config.training import TrainConfig
from glm3cli.data.kinds import DataKind
from glm3cli.data.prefixes import Blend, data_fingerprint
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.host.fingerprints import fingerprint
from glm3cli.train.resumable import find_resume

if TYPE_CHECKING:
    from glm3cli.data.raw import RawData

# Settings of the run's folder that change what is trained; the others say where and when to write.
_OF_RUN = {"seed", "deterministic"}
# Where things are, which may change as long as they are the same; what they are is compared.
_PLACES = {"model", "data", "data_cache", "tokenizer", "shared_storage"}
# Settings that cut the same work in other ways, as the parallel sizes do.
_CUTS = {"micro_batch_size", "padding", "padding_side", "pad_to_multiple"}
# Settings of what is shown before the first step, and kept after the last.
_AROUND = {"preview", "keep_best", "early_stop", "export_hf"}
# Settings by which other weights are trained, so that the optimizer's state doesn't fit.
_TRAINED = {"lora_rank", "lora_target", "lora_variant", "train_only", "freeze"}
_OWN = "a checkpoint of the run itself"
# Settings by which the samples get another order.
_ORDER = {"data", "seed", "split", "seq_length", "packing", "group_by_length"}


@dataclass(frozen=True)
class Change:
    """Something in which a run that goes on differs from the one that was saved.

    Attributes:
        name: `command`, `model` or `data`, or the name of an option.
        before: What it was.
        now: What it is.
    """

    name: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.now}"


@dataclass(frozen=True)
class Origin:
    """What a run is made of.

    Attributes:
        command: `pretrain` or `finetune`.
        model: The model that the run starts from: its `name`, and its `content`.
        data: The data sets in their order: the `name`, the `content`, and the `share` of each.
        options: The values of the options that change what is trained, by their names.
    """

    command: str
    model: dict[str, str]
    data: list[dict[str, Any]]
    options: dict[str, Any]

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        kind: DataKind,
        model: ModelConfig,
        location: Location | None,
        blend: Blend,
        raw: "Mapping[str, RawData]",
    ) -> "Origin":
        """Finds out what a run is made of.

        Args:
            config: The settings of the run.
            kind: The kind of data that the command reads.
            model: The shape of the model.
            location: Where the weights to start from are; None for random ones.
            blend: The items of --data and their weights, as the user gave them.
            raw: The items that have to be preprocessed first, by their names in `blend`.

        Raises:
            OSError: A file can't be read.
        """
        contents = [
            raw[item].fingerprint if item in raw else data_fingerprint(item, kind)
            for item in blend.prefixes
        ]
        data = [
            {"name": name, "content": content, "share": share}
            for name, content, share in zip(blend.prefixes, contents, _shares(blend), strict=True)
        ]
        named = str(config.model or f"random weights of {config.shape}")
        content = _random(model) if location is None else _weights(location, config.save)
        return cls(
            kind.command, {"name": named, "content": content}, data, _compared_options(config)
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by their names, as a manifest has them."""
        return asdict(self)

    def changes(self, noted: Mapping[str, Any]) -> list[Change]:
        """Returns in what this run differs from one that was saved.

        Args:
            noted: The `to_dict` of the run that was saved. What it lacks isn't compared.
        """
        found = []
        if "command" in noted and noted["command"] != self.command:
            found.append(Change("command", noted["command"], self.command))
        if "model" in noted and not _same_model(noted["model"], self.model):
            found.append(Change("model", _told(noted["model"]), _told(self.model)))
        if "data" in noted and _contents(noted["data"]) != _contents(self.data):
            before, now = (", ".join(map(_told, data)) for data in (noted["data"], self.data))
            found.append(Change("data", before, now))
        before = noted.get("options", {})
        meant_before, meant = _meant(before), _meant(self.options)
        found += [
            Change(name, _as_text(before[name]), _as_text(value))
            for name, value in self.options.items()
            if name in before
            and before[name] != value
            and meant_before.get(name, before[name]) != meant.get(name, value)
        ]
        return found


def _told(part: Mapping[str, Any]) -> str:
    """Returns the name, the content and the share of a model or a data set as text."""
    share = f", {part['share']:.4g} of the samples" if part.get("share") else ""
    return f"{part['name']}: {part['content']}{share}"


def _contents(data: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Returns what decides whether two blends are the same."""
    return [(part["content"], part["share"]) for part in data]


def _meant(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the options of an adapter amount to, which may be written in several ways."""
    given = {name: value for name, value in options.items() if name in LoraOptions.model_fields}
    return LoraOptions.model_construct(**given).meant


def _as_text(value: Any) -> str:
    """Returns the value of an option as text."""
    return "none" if value is None else str(value)


def _shares(blend: Blend) -> list[float | None]:
    """Returns the shares of the data sets of a blend; None where they follow from their sizes."""
    if blend.weights is None or len(blend.weights) == 1:
        return [None] * len(blend.prefixes)
    return [round(weight / sum(blend.weights), 12) for weight in blend.weights]


def _random(model: ModelConfig) -> str:
    """Returns what tells random weights of one shape from those of another."""
    return ", ".join(f"{name} {value}" for name, value in model.model_dump(mode="json").items())


def _weights(location: Location, run: Path) -> str:
    """Returns the fingerprint of a model's weights and config.json; that of `run` is its own."""
    folder = location.folder.resolve()
    if run.resolve() in folder.parents:
        return _OWN
    return weights_fingerprint(location)


def weights_fingerprint(location: Location) -> str:
    """Returns the size and a hash of the content of a model's weights and config.json.

    Raises:
        OSError: A file can't be read.
    """
    folder = location.folder.resolve()
    places = [folder, *location.adapters]
    found = [path for place in places for path in sorted(place.rglob("*"))]
    files = [path for path in found if path.suffix in WEIGHT_SUFFIXES]
    return fingerprint([*files, *filter(None, [location.config])])


def _same_model(noted: Mapping[str, str], model: Mapping[str, str]) -> bool:
    """Returns whether two models are the same; a run's own checkpoints go on with any."""
    return noted["content"] == model["content"] or _OWN in (noted["content"], model["content"])


def _compared_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that change what is trained, by their names, with their values."""
    elsewhere = {LAUNCH, PARALLEL, PLANNING, REPORT}
    flags = [config.flag_of(field) for field in config.option_fields()]
    names = {
        str(flag.name)
        for flag in flags
        if flag.panel not in elsewhere and (flag.panel != RUN or flag.name in _OF_RUN)
    }
    options, left_out = config.to_options(), _PLACES | _CUTS | _AROUND
    return {name: value for name, value in options.items() if name in names - left_out}


def noted_in(checkpoint: Path) -> dict[str, Any]:
    """Returns what a checkpoint's manifest says about its run; empty if it says nothing.

    Checkpoints of other programs have no manifest, and those of older versions say nothing there.
    """
    try:
        return read_manifest(checkpoint).settings
    except CheckpointError:
        return {}


def newest_noted(config: TrainConfig) -> Path | None:
    """Returns the newest checkpoint of a run on this machine that says what it is of, or None.

    Raises:
        ConfigError: --resume is `never`, but the run has checkpoints.
        CheckpointError: --resume names no checkpoint.
    """
    found = find_resume(config.save, config.resume)
    return next((checkpoint for checkpoint in found if noted_in(checkpoint)), None)


def check_goes_on(checkpoint: Path, origin: Origin, allowed: Sequence[str]) -> list[Change] | None:
    """Refuses a run whose command, model or data changed, unless that is allowed.

    Args:
        checkpoint: The checkpoint that the run goes on from.
        origin: What the run is made of.
        allowed: The value of `--allow-changed`.

    Returns:
        In what the run differs from the one that wrote the checkpoint; None if that doesn't say.

    Raises:
        ConfigError: The command, the model or the data changed.
    """
    noted = noted_in(checkpoint)
    if not noted:
        return None
    changes = origin.changes(noted)
    _refuse_other_weights(checkpoint, changes)
    refused = [one for one in changes if one.name in IDENTITY and one.name not in allowed]
    if refused:
        names = ",".join(dict.fromkeys([*allowed, *(change.name for change in refused)]))
        raise ConfigError(
            f"{checkpoint} is of another training: {'; '.join(map(str, refused))}",
            f"to start anew, give another --save, and --model {checkpoint} for its weights; to go "
            "on with its optimizer, schedule and position in the data nonetheless, add "
            f"--allow-changed {names}",
        )
    return changes


def _refuse_other_weights(checkpoint: Path, changes: Sequence[Change]) -> None:
    """Refuses a run that trains other weights than the one that was saved.

    Raises:
        ConfigError: An option changed that says what is trained.
    """
    others = [change for change in changes if change.name in _TRAINED]
    if others:
        raise ConfigError(
            f"{checkpoint} has the optimizer's state of other weights: "
            f"{'; '.join(map(str, others))}",
            "give these options as they were, or another --save to start anew",
        )


def lost_order(changes: Iterable[Change]) -> list[str]:
    """Returns a phrase about the order of the samples, if the changes have given them another one.

    Args:
        changes: In what the run differs from the one that was saved.
    """
    names = [change.name for change in changes if change.name in _ORDER]
    return [f"the order of the samples (other {', '.join(names)})"] if names else []
