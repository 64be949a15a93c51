"""Compares the shape that a script's flags describe with the model that they are given for."""

from pathlib import Path

from glm3cli.config.model import ModelConfig
from glm3cli.config.scripts.translation import Flags
from glm3cli.errors import CheckpointError, ConfigError

# The fields of a model's config.json that a flag repeats.
_FIELDS = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--num-query-groups": "num_query_groups",
    "--kv-channels": "kv_channels",
    "--padded-vocab-size": "padded_vocab_size",
    "--norm-epsilon": "layernorm_epsilon",
    "--rotary-base": "rotary_base",
}
_ROTARY = 0.5  # the share of a head that the family rotates


def compare_shape(flags: Flags, place: str) -> list[str]:
    """Notes the flags that describe another model than the one in a folder.

    Args:
        flags: The flags of a program.
        place: The folder that the script loads, whose config.json is read if it is there.

    Returns:
        A sentence for each flag that the model contradicts.
    """
    found = []
    model = _model_at(Path(place))
    for flag, field in _FIELDS.items():
        value = flags.value(flag)
        said = getattr(model, field, None)
        if model is not None and value and _number(value) != said:
            flags.note(flag, "not supported", f"the model's config.json says {said}, which counts")
            found.append(f"{flag} {value} contradicts the model's config.json, which says {said}")
    share = flags.value("--rotary-percent")
    if share and _number(share) != _ROTARY:
        flags.note("--rotary-percent", "not supported", "the family rotates half of each head")
        found.append(
            f"--rotary-percent {share}: the model rotates {_ROTARY} of each head, so the script "
            "trained with other positions than the model has; glm3 uses the model's"
        )
    return found


def _model_at(folder: Path) -> ModelConfig | None:
    """Returns the shape of the model in a folder; None if there is none that can be read."""
    try:
        return ModelConfig.from_file(folder) if (folder / "config.json").is_file() else None
    except (CheckpointError, ConfigError):
        return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
