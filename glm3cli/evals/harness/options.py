"""Reads the generation options of a task of lm-evaluation-harness, named as in transformers."""

from collections.abc import Mapping
from typing import Any

from glm3cli.errors import ConfigError
from glm3cli.infer.decoding.beams import Beams
from glm3cli.infer.decoding.rules import Decoding
from glm3cli.infer.sampling import Sampling

# lm-evaluation-harness's own default for tasks that don't say how long an answer may be.
_MAX_NEW_TOKENS = 256
# What each option is where it isn't given, and means nothing then.
_NUMBERS = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
_OTHERS = {
    "until",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "do_sample",
    "temperature",
    "num_beams",
    "length_penalty",
    "early_stopping",
}


def decoding_of(options: Mapping[str, Any]) -> Decoding:
    """Converts a task's generation options to how our engine makes a continuation.

    Decoding is greedy unless the temperature is above 0 and `do_sample` isn't false.

    Raises:
        ConfigError: There is an option that we don't have.
    """
    if unknown := sorted(options.keys() - _OTHERS - _NUMBERS.keys()):
        raise ConfigError(
            f"a task has the generation option {unknown[0]!r}, which glm3 doesn't have",
            f"it has {', '.join(sorted(_OTHERS | _NUMBERS.keys()))}",
        )
    until = options.get("until") or []
    lengths = (options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
    return Decoding(
        sampling=_sampling_of(options),
        max_new_tokens=int(next((one for one in lengths if one is not None), _MAX_NEW_TOKENS)),
        beams=_beams_of(options),
        stops=(until,) if isinstance(until, str) else tuple(until),
        logprobs=None,
    )


def _sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Returns the rule by which tokens are chosen."""
    temperature = float(options.get("temperature") or 0.0)
    draws = temperature > 0 and options.get("do_sample", True)
    numbers: dict[str, Any] = {
        name: type(least)(least if options.get(name) is None else options[name])
        for name, least in _NUMBERS.items()
    }
    if not draws:
        numbers |= {name: _NUMBERS[name] for name in ("top_k", "top_p", "min_p")}
    return Sampling(greedy=not draws, temperature=temperature if draws else 1.0, **numbers)


def _beams_of(options: Mapping[str, Any]) -> Beams | None:
    """Returns the rule of a beam search; None where none is asked for."""
    count = int(options.get("num_beams") or 1)
    if count == 1:
        return None
    return Beams(
        num_beams=count,
        length_penalty=float(options.get("length_penalty", 1.0)),
        early_stopping=options.get("early_stopping", False),
        num_return=1,
    )
