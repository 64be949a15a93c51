"""The table of the models that glm3 takes, and the traits by which they differ.

Sources: the config.json, tokenizer files and remote code that each model was published with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# What the text's own tokens are read from: a sentencepiece model, or the ranks of tiktoken.
VocabularyKind = Literal["sentencepiece", "tiktoken"]
# How turns are written (data/tokens/formats).
FormatName = Literal[
    "chatglm2", "codegeex2", "chatglm3", "glm4", "codegeex4", "glm4-0414", "glm-z1"
]
# What rope_ratio of a config.json in the original form multiplies or divides.
RopeKind = Literal["base", "positions"]


@dataclass(frozen=True)
class Tokens:
    """What the tokenizers of a generation of models have in common.

    Attributes:
        kind: What the tokens of the text are read from.
        special: The names of the special tokens in the order of their ids, which follow those of
            the text's tokens. A folder whose tokenizer_config.json lists them counts more.
        prefix: The special tokens with which every sequence starts.
        ends: The special tokens that end an answer, beside the end token.
        end: The end token; None where the sentencepiece model has it, as id 2.
        pattern: The regular expression by which tiktoken cuts a text into words; "" for
            sentencepiece.
    """

    kind: VocabularyKind
    special: tuple[str, ...]
    prefix: tuple[str, str]
    ends: tuple[str, ...] = ()
    end: str | None = None
    pattern: str = ""


@dataclass(frozen=True)
class Member:
    """One row of the table.

    Attributes:
        name: The model's name on its hub.
        tokens: The traits of its tokenizer.
        chat: How its turns are written.
        owner: The hub's organisation that published it.
        rope: What rope_ratio of its config.json does.
        shows: Values of its config.json that tell it from the other members of its generation.
    """

    name: str
    tokens: Tokens
    chat: FormatName
    owner: str = "THUDM"
    rope: RopeKind = "base"
    shows: Mapping[str, Any] = field(default_factory=dict)

    @property
    def repository(self) -> str:
        """The model's full name on its hub, which `_name_or_path` of its config.json holds."""
        return f"{self.owner}/{self.name}"


_MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# An answer also ends where somebody else's turn begins.
_TURNS = ("<|user|>", "<|observation|>")

CHATGLM2 = Tokens("sentencepiece", (*_MASKS, "sop", "eop"), ("[gMASK]", "sop"))
CHATGLM3 = Tokens("sentencepiece", (*_MASKS, "sop", "eop", *_ROLES), ("[gMASK]", "sop"), _TURNS)
GLM4 = Tokens(
    "tiktoken",
    (
        *("<|endoftext|>", *_MASKS, "<sop>", "<eop>", *_ROLES),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    ),
    ("[gMASK]", "<sop>"),
    _TURNS,
    end="<|endoftext|>",
    pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
_SMALL, _LARGE = 65_024, 151_552  # rows of the embedding: of sentencepiece, of tiktoken

MEMBERS: tuple[Member, ...] = (
    Member(
        "chatglm2-6b",
        CHATGLM2,
        "chatglm2",
        shows={"padded_vocab_size": _SMALL, "seq_length": 32_768, "rope_ratio": None},
    ),
    Member(
        "chatglm2-6b-32k",
        CHATGLM2,
        "chatglm2",
        rope="positions",
        shows={"padded_vocab_size": _SMALL, "rope_ratio": 16},
    ),
    Member(
        "codegeex2-6b",
        CHATGLM2,
        "codegeex2",
        shows={
            **{"padded_vocab_size": _SMALL, "seq_length": 8_192, "rope_ratio": None},
            "interleaved_qkv": False,
        },
    ),
    Member(
        "chatglm3-6b",
        CHATGLM3,
        "chatglm3",
        shows={"padded_vocab_size": _SMALL, "seq_length": 8_192, "rope_ratio": None},
    ),
    Member("chatglm3-6b-base", CHATGLM3, "chatglm3"),
    Member(
        "chatglm3-6b-32k",
        CHATGLM3,
        "chatglm3",
        shows={"padded_vocab_size": _SMALL, "rope_ratio": 50},
    ),
    Member(
        "chatglm3-6b-128k",
        CHATGLM3,
        "chatglm3",
        shows={"padded_vocab_size": _SMALL, "rope_ratio": 500},
    ),
    Member(
        "glm-4-9b-chat",
        GLM4,
        "glm4",
        shows={"padded_vocab_size": _LARGE, "rope_ratio": 500, "multi_query_group_num": 2},
    ),
    Member("glm-4-9b", GLM4, "glm4", shows={"padded_vocab_size": _LARGE, "seq_length": 8_192}),
    Member(
        "glm-4-9b-chat-1m",
        GLM4,
        "glm4",
        shows={"padded_vocab_size": _LARGE, "rope_ratio": 10_000},
    ),
    Member("LongWriter-glm4-9b", GLM4, "glm4"),
    Member("codegeex4-all-9b", GLM4, "codegeex4"),
    Member("GLM-4-9B-0414", GLM4, "glm4-0414", shows={"model_type": "glm4"}),
    Member("GLM-4-32B-0414", GLM4, "glm4-0414", shows={"model_type": "glm4", "hidden_size": 6_144}),
    Member("GLM-4-32B-Base-0414", GLM4, "glm4-0414"),
    Member("GLM-Z1-9B-0414", GLM4, "glm-z1"),
    Member("GLM-Z1-32B-0414", GLM4, "glm-z1"),
)
