"""What a model says itself about how its answers are made: its generation_config.json.

Nothing here imports torch.
"""

import logging
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from glm3cli.checkpoint.locate import locate
from glm3cli.config.inference import COLDEST, DEFAULTS, GenerateConfig, SamplingOptions
from glm3cli.errors import CheckpointError
from glm3cli.host.parsing import parse_json
from glm3cli.parallel.launch import is_speaker

Options = TypeVar("Options", bound=SamplingOptions)
FILE_NAME = "generation_config.json"
# How transformers writes what we give words.
_EARLY_STOPPING = {False: "no", True: "yes", "never": "never"}
# What has no use when the likeliest tokens are taken.
_OF_DRAWS = ("temperature", "top_k", "top_p", "min_p")
# A mass that the likeliest token alone always has, as transformers takes a top_p of 0.
_LEAST_MASS = 1e-9
# What transformers reads and we don't, with the values that ask for nothing.
_UNREAD: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "typical_p": (1,),
    "watermarking_config": (),
}

_log = logging.getLogger(__name__)


def with_defaults(config: GenerateConfig) -> GenerateConfig:
    """Returns the settings with the values of the model's own file where no option was given.

    Log lines say which they are, and what else in the file would change answers, but isn't read.

    Raises:
        CheckpointError: The file can't be read, or has a value that makes no sense.
    """
    path = locate(config.model).companions / FILE_NAME
    values = read_generation_config(path)
    found = from_file(config, values, path)
    changed = {
        name: getattr(found, name)
        for name in _told(values)
        if getattr(found, name) != getattr(config, name)
    }
    if found.greedy and not config.greedy and config.temperature != 0:
        changed = {name: changed[name] for name in changed if name not in _OF_DRAWS}
        cause = "temperature" if values.get("do_sample", True) else "do_sample"
        changed |= {cause: values[cause]} if cause in values else {}
    if not is_speaker():
        return found
    if unread := unread_in(values, is_served=bool(config.serve)):
        _log.warning("%s: not read here, and without effect: %s", path, ", ".join(unread))
    if changed:
        said = ", ".join(f"{name} {value}" for name, value in changed.items())
        _log.warning("%s: %s; options win over it", path, said)
    return found


def from_file(options: Options, values: dict[str, Any], path: Path) -> Options:
    """Returns options with the values of a generation_config.json, and defaults for the rest.

    Args:
        options: The options; None where none was given.
        values: The content of the file.
        path: The file, for the error message.

    Raises:
        CheckpointError: A value of the file makes no sense.
    """
    told = {k: v for k, v in _told(values).items() if getattr(options, k, None) in (None, [])}
    if getattr(options, "serve", None):  # each request says before which texts its answer ends
        told.pop("stop", None)
    whole = {**options.model_dump(), **_missing(options), **told}
    is_search = whole["num_beams"] != 1
    draws = options.asks_to_draw or values.get("do_sample", not is_search)
    if options.greedy or whole["temperature"] == 0 or not draws:
        whole |= {"greedy": True, "temperature": DEFAULTS["temperature"]}
    if not is_search:  # what the file says of beams counts with beams alone
        whole |= {name: DEFAULTS[name] for name in ("length_penalty", "early_stopping")}
    try:
        return type(options).model_validate(whole)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise CheckpointError(
            f"{path}: {name} {problem['msg'].removeprefix('Value error, ')}".replace("  ", " "),
            "mend the file, or give the option, which wins over it",
        ) from None


def _missing(options: SamplingOptions) -> dict[str, Any]:
    """Returns our defaults of the options that weren't given."""
    return {name: value for name, value in DEFAULTS.items() if getattr(options, name) is None}


def read_generation_config(path: Path) -> dict[str, Any]:
    """Returns the content of a generation_config.json; nothing if there is no such file.

    Raises:
        CheckpointError: The file can't be read, or holds no JSON object.
    """
    try:
        values = parse_json(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}", "mend or remove the file") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object", "mend or remove the file")
    return values


def unread_in(values: dict[str, Any], *, is_served: bool = False) -> list[str]:
    """Returns the names of what would change answers in transformers, but isn't read here.

    Args:
        values: The content of a generation_config.json.
        is_served: Whether each request says itself before which texts its answer ends.
    """
    names = [
        name
        for name, plain in _UNREAD.items()
        if values.get(name) is not None and values[name] not in plain
    ]
    return [*names, *(["stop_strings"] if is_served and values.get("stop_strings") else [])]


def _told(values: dict[str, Any]) -> dict[str, Any]:
    """Returns what a generation_config.json says, under the names of our options."""
    told = {name: values[name] for name in DEFAULTS if values.get(name) is not None}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"):
        if isinstance(told.get(name), int):
            told[name] = float(told[name])
    if "early_stopping" in told:
        told["early_stopping"] = _EARLY_STOPPING.get(told["early_stopping"], told["early_stopping"])
    temperature = told.get("temperature")
    if isinstance(temperature, float) and 0 < temperature < COLDEST:
        told["temperature"] = 0.0  # nothing but the likeliest token is ever drawn
    if told.get("top_p") == 0:
        told["top_p"] = _LEAST_MASS
    stops = values.get("stop_strings")
    if stops:
        told["stop"] = [stops] if isinstance(stops, str) else stops
    ends = values.get("eos_token_id")
    if ends is not None:
        told["stop_id"] = ends if isinstance(ends, list) else [ends]
    return told
