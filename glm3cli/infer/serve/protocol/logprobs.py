"""Log-probabilities of tokens, as completions and chats show them."""

import math
from collections.abc import Sequence
from typing import Any

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.infer.serve.orders import Token

# What OpenAI shows for a token that can't come; JSON has no minus infinity.
_NEVER = -9999.0


def of_completion(
    tokenizer: Tokenizer, tokens: Sequence[Token], count: int, offset: int
) -> dict[str, Any]:
    """Returns the `logprobs` of a completion.

    Args:
        tokenizer: The tokenizer.
        tokens: The tokens, the first of which may have no log-probability.
        count: The number of likeliest tokens that are wanted beside each.
        offset: The number of characters before the first token.
    """
    names, offsets = [], []
    decoder = tokenizer.stream_decoder(goes_on=offset > 0)
    for token in tokens:
        names.append(_name(tokenizer, token.id))
        offsets.append(offset)
        offset += len(decoder.push(token.id))
    tops = [
        None
        if token.logprob is None
        else {_name(tokenizer, one): _finite(logprob) for one, logprob in _shown(token, count)}
        for token in tokens
    ]
    return {
        "tokens": names,
        "token_logprobs": [None if t.logprob is None else _finite(t.logprob) for t in tokens],
        "top_logprobs": tops if count else None,
        "text_offset": offsets,
    }


def of_chat(tokenizer: Tokenizer, tokens: Sequence[Token], count: int) -> dict[str, Any]:
    """Returns the `logprobs` of an answer in a chat, or of a part of it.

    Args:
        tokenizer: The tokenizer.
        tokens: The tokens.
        count: The number of likeliest tokens that are wanted beside each.
    """
    content = [
        {
            **_entry(tokenizer, token.id, token.logprob or 0.0),
            "top_logprobs": [_entry(tokenizer, *one) for one in token.top[:count]],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _shown(token: Token, count: int) -> list[tuple[int, float]]:
    """Returns the likeliest tokens, and the one that is there if it isn't one of them."""
    top = token.top[:count]
    is_there = any(one == token.id for one, _ in top)
    return top if is_there or token.logprob is None else [*top, (token.id, token.logprob)]


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Returns a token of a chat with its bytes."""
    piece = tokenizer.piece(token)
    data = piece if isinstance(piece, bytes) else piece.encode()
    name = _text(piece) or _escaped(data) or tokenizer.token_name(token)
    return {"token": name, "logprob": _finite(logprob), "bytes": list(data)}


def _name(tokenizer: Tokenizer, token: int) -> str:
    """Returns how a completion names a token."""
    piece = tokenizer.piece(token)
    if isinstance(piece, bytes) and not _text(piece):
        return f"bytes:{_escaped(piece)}"
    return _text(piece) or tokenizer.token_name(token)


def _text(piece: str | bytes) -> str:
    """Returns the text of a token; "" for bytes that are no whole characters."""
    try:
        return piece if isinstance(piece, str) else piece.decode()
    except UnicodeDecodeError:
        return ""


def _escaped(data: bytes) -> str:
    """Returns bytes as they are written within a text."""
    return "".join(f"\\x{byte:02x}" for byte in data)


def _finite(number: float) -> float:
    """Returns a log-probability that JSON can write."""
    return number if math.isfinite(number) else _NEVER
