"""Answers for the tokenizer alone, as vLLM's server gives them.

lm-evaluation-harness asks for them (lm_eval/utils.py, RemoteTokenizer), so that it needs no
tokenizer of its own.
"""

from typing import Any

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.infer.serve.protocol.asked import Reader
from glm3cli.infer.serve.protocol.bodies import DetokenizeBody, TokenizeBody

# A text that is one of these and nothing else is the token, which no text has otherwise.
_BEGIN, _END = "[gMASK]", "</s>"


def tokenizer_info(reader: Reader) -> dict[str, Any]:
    """Returns what a client must know of the tokenizer."""
    return {
        "tokenizer_class": "ChatGLMTokenizer",
        "bos_token": _BEGIN,
        "eos_token": _END,
        "pad_token": reader.tokenizer.token_name(reader.tokenizer.pad_id),
        "vocab_size": reader.tokenizer.vocab_size,
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


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text, or the one of a special token that it names."""
    if text == _END:
        return [tokenizer.eos_id]
    return [tokenizer.special(text)] if text == _BEGIN else tokenizer.encode(text)
