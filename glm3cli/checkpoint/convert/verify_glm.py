"""Verifies a folder in the glm layout by what it is written for: transformers, without remote code.

transformers loads the folder offline. Its config must have the model's shape, its generation config
our ids of end and padding, and its tokenizer our ids of texts. The logits of a small model must be
those of our own forward pass. transformers is imported here alone, and only when it is needed.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm3cli.checkpoint.layouts.companions import stop_tokens
from glm3cli.config.glm import from_glm
from glm3cli.config.model import ModelConfig
from glm3cli.data.tokens.fast.tokenizer import to_fast
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.device.dtypes import dtype_name
from glm3cli.errors import CheckpointError, Glm3Error, StoppedError
from glm3cli.host.memory import PrivateMemory
from glm3cli.host.versions import versions

# The median of the differences between two forward passes in fp32, as a share of the largest logit
# (of 1, if that is larger). It isn't 0, since transformers adds the products in another order: its
# matrix products are batched, and it multiplies Q, K and V by three matrices. In 1,350 random
# models the median was at most 4e-6. The largest difference is no measure: where a softmax is
# nearly at a tie, it reached 4e-4. Rows in another order or another rotation change all positions
# but the first, and by about the logits' own size.
_TOLERANCE = 1e-4
_TEXTS = (
    "",
    "What is a lake?",
    "  spaces  in front,   between and behind ",
    "湖泊是什么。请用一句话回答。",
    "ChatGLM3-6B 有 6,243,584,000 个参数 (2023年10月27日).",
    "Lines\nof text\n\n\twith tabs\r\nand 一行中文\n",
    "3.14159 + 2.71828 = 5.85987; 0123456789",
    "naïve café, Ελλάδα, 東京, 😀",
)
_STOPS = tuple(stop_tokens(None))  # the names of the ids that end and pad a reply
# The options by which transformers never asks the network and never runs code of the folder.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def verify_files(folder: Path, target: Path, model: ModelConfig, ours: Tokenizer | None) -> None:
    """Loads config, generation config and tokenizer by transformers and compares them with ours.

    Args:
        folder: The new folder.
        target: The name that it is going to have, for messages.
        model: The shape of the model that was written.
        ours: The tokenizer of the model; None without one.

    Raises:
        CheckpointError: transformers can't load a file, or reads something else from it.
    """
    with _sentences(target):
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        _compare_shape(config.to_dict(), model, target / "config.json")
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        for name, found in {"config.json": config, "generation_config.json": generation}.items():
            _compare({key: getattr(found, key) for key in _STOPS}, stop_tokens(ours), name)
        if ours is not None:
            tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
            _compare_ids(tokenizer, ours)
            _compare_rules(tokenizer, ours)


def verify_logits(
    folder: Path, target: Path, prompt: Tensor, expected: Tensor, memory: PrivateMemory
) -> None:
    """Loads the model by transformers and compares its logits with those of our own forward pass.

    Args:
        folder: The new folder.
        target: The name that it is going to have, for messages.
        prompt: Token ids, [tokens].
        expected: The logits of our forward pass, [tokens, vocabulary] in fp32.
        memory: Measures the memory of this process while the model is loaded.

    Raises:
        CheckpointError: transformers can't load the model, misses weights, finds weights that it
            doesn't know, or computes other logits.
    """
    with _sentences(target):
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **_LOCAL
        )
        model, report = loaded
        memory.sample()
        for name, tensors in report.items():
            if tensors:
                raise _Mismatch(f"finds {name.replace('_', ' ')}: {tensors}")
        with torch.inference_mode():
            logits = model.eval()(prompt.unsqueeze(0)).logits[0]
        memory.sample()
    difference = float((logits - expected).abs().median())  # NaN if any is
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise _error(target, f"computes other logits than glm3 (by {difference:.2e})")


class _Mismatch(Exception):  # noqa: N818 - it becomes an error in `_sentences`
    """Something that transformers reads otherwise than it was written; says what it does."""


@contextmanager
def _sentences(target: Path) -> Iterator[None]:
    """Runs a block that uses transformers, without its advice, warnings and bars.

    Raises:
        CheckpointError: The block raised anything else: damaged files make transformers and
            tokenizers raise nearly anything.
        StoppedError: The process received SIGTERM.
    """
    try:
        with warnings.catch_warnings(action="ignore"), _quiet():
            yield
    except StoppedError:
        raise
    except _Mismatch as mismatch:
        raise _error(target, str(mismatch)) from None
    except Exception as error:
        reason = error.message if isinstance(error, Glm3Error) else str(error)
        reason = (reason.strip().splitlines() or [type(error).__name__])[0]
        raise _error(target, f"can't load it: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log and the bars of transformers while the block runs."""
    from transformers.utils import logging as module

    chatter: Any = module
    verbosity, has_bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if has_bars:
            chatter.enable_progress_bar()


def _error(target: Path, what: str) -> CheckpointError:
    """Returns the error that says what transformers does wrong with the new folder."""
    version = versions("transformers")["transformers"]
    return CheckpointError(
        f"{target}: transformers {version} {what}",
        "this is a bug of glm3, or of this version of transformers: please report it; "
        "nothing was kept",
    )


def _compare(found: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> None:
    """Compares values that transformers reads from the file `name` with those that we wrote."""
    for key, value in expected.items():
        if found[key] != value:
            raise _Mismatch(f"reads {key} {found[key]!r} from {name} instead of {value!r}")


def _compare_shape(content: dict[str, Any], model: ModelConfig, path: Path) -> None:
    """Compares a config as transformers holds it with the shape of the model that was written."""
    dtype = getattr(torch, str(content["dtype"]).removeprefix("torch."))
    found = ModelConfig.parse({**from_glm(content, path), "torch_dtype": dtype_name(dtype)})
    _compare(found.model_dump(), model.model_dump(), path.name)


def _compare_ids(found: Any, ours: Tokenizer) -> None:
    """Compares the ids of texts: some fixed ones, and the spelling of every piece.

    Behind a line break, which no piece of sentencepiece contains, every piece stands alone: the
    tokenizer puts a space in front of a text.
    """
    for text in _TEXTS:
        _same_ids(text, found(text)["input_ids"], ours)
    spellings = [f"\n{text}" for text in _spellings(ours)]
    # The spelling of a piece may contain that of a special token.
    all_ids = found(spellings, split_special_tokens=True)["input_ids"]
    for text, ids in zip(spellings, all_ids, strict=True):
        _same_ids(text, ids, ours)


def _spellings(ours: Tokenizer) -> Iterator[str]:
    """Yields the text of every token that has whole characters."""
    for token in filter(ours.vocabulary.is_text, range(ours.vocabulary.size)):
        piece = ours.piece(token)
        if isinstance(piece, str):
            yield piece
        elif len(piece) > 1:
            with suppress(UnicodeDecodeError):
                yield piece.decode()


def _compare_rules(found: Any, ours: Tokenizer) -> None:
    """Compares the vocabulary and the merges that the loaded tokenizer holds with ours.

    This finds what changes no id of the texts above, such as two merges in the wrong order.
    """
    loaded = json.loads(found.backend_tokenizer.to_str())["model"]
    expected = to_fast(ours)["model"]
    if loaded["vocab"] != expected["vocab"]:
        raise _Mismatch("holds another vocabulary than that of tokenizer.model")
    for number, (merge, other) in enumerate(
        zip_longest(loaded["merges"], expected["merges"]), start=1
    ):
        if merge != other:
            raise _Mismatch(f"holds {merge} as merge {number} of the tokenizer instead of {other}")


def _same_ids(text: str, found: list[int], ours: Tokenizer) -> None:
    """Compares the ids of one text, the prefix included."""
    expected = [*ours.prefix, *ours.encode(text)]
    if found != expected:
        raise _Mismatch(f"reads {text!r} as the ids {found} instead of {expected}")
