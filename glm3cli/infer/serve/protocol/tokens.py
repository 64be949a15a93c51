"""Answers for the tokenizer alone, as vLLM's server gives them.

lm-evaluation-harness asks for them (lm_eval/utils.py, RemoteTokenizer), so that it needs no
tokenizer of its own.
"""

from typing import Any

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.infer.serve.protocol.asked import Reader
from glm3cli.infer.serve.protocol.bodies import DetokenizeBody, TokenizeBody


def tokenizer_info(reader: Reader) -> dict[str, Any]:
    """Returns what a client must know of the tokenizer."""
    tokenizer = reader.tokenizer
    begin, end = _ends(tokenizer)
    return {
        "tokenizer_class": "ChatGLMTokenizer",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": tokenizer.token_name(tokenizer.pad_id),
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": reader.max_tokens,
    }


def tokenize(reader: Reader, body: TokenizeBody) -> dict[str, Any]:
    """Returns the token ids of a text or of a chat.

    Raises:
        ApiError: The messages make no sense.
    """
    tokenizer = reader.tokenizer
    if body.prompt is None:
        ids = reader.chat_ids(body.messages, body.tools)
    else:
        ids = _encode(tokenizer, body.prompt)
        if body.add_special_tokens:
            ids = [*tokenizer.prefix, *ids]
    return {"count": len(ids), "max_model_len": reader.max_tokens, "tokens": ids}


def detokenize(reader: Reader, body: DetokenizeBody) -> dict[str, Any]:
    """Returns the text of token ids; those that the tokenizer doesn't know have none."""
    return {"prompt": reader.tokenizer.decode(body.tokens)}


def _ends(tokenizer: Tokenizer) -> tuple[str | None, str]:
    """Returns the names of the first token of every prompt, if there is one, and of the end."""
    prefix = tokenizer.prefix
    begin = tokenizer.token_name(prefix[0]) if prefix else None
    return begin, tokenizer.token_name(tokenizer.eos_id)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text.

    A text that is the name of the first or the last token of texts, and nothing else, is that
    token, which no text has otherwise.
    """
    begin, end = _ends(tokenizer)
    if text == end:
        return [tokenizer.eos_id]
    return [tokenizer.prefix[0]] if text == begin else tokenizer.encode(text)
