"""The relatives of the family that glm3 doesn't take, by name, and why not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Refused:
    """A model that glm3 doesn't take.

    Attributes:
        name: Its name.
        reason: What it has that glm3 doesn't compute.
        shows: Says whether a config.json is the model's.
    """

    name: str
    reason: str
    shows: Callable[[Content], bool]


def _has(**values: Any) -> Callable[[Content], bool]:
    """Returns a function that says whether a config.json has all of these values."""
    return lambda config: all(config.get(name) == value for name, value in values.items())


REFUSED: tuple[Refused, ...] = (
    Refused(
        "ChatGLM-6B, the first one",
        "its positions are of two dimensions, and its attention sees the whole prompt",
        lambda config: "position_encoding_2d" in config,
    ),
    Refused(
        "CogAgent-9B",
        "it sees images, and has another rotation (original_rope false)",
        lambda config: (
            config.get("model_type") == "chatglm" and config.get("original_rope") is False
        ),
    ),
    Refused(
        "GLM-4V-9B",
        "it has a tower that sees images",
        lambda config: config.get("model_type") == "chatglm" and "vision_config" in config,
    ),
    Refused("GLM-4.1V", "it has a tower that sees images", _has(model_type="glm4v")),
    Refused("GLM-4.5 or later", "its MLPs are mixtures of experts", _has(model_type="glm4_moe")),
    Refused(
        "GLM-4.7-Flash",
        "its MLPs are mixtures of experts",
        _has(model_type="glm4_moe_lite"),
    ),
    Refused(
        "GLM-Edge",
        "it rotates whole heads, and its queries and keys have no bias",
        lambda config: (
            config.get("model_type") == "glm"
            and config.get("attention_bias") is False
            and config.get("partial_rotary_factor") == 1.0
        ),
    ),
)


def refused(config: Content) -> Refused | None:
    """Returns the model that a config.json is of, if it is one that glm3 doesn't take."""
    return next((one for one in REFUSED if one.shows(config)), None)
