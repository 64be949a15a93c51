"""Handlers turn one row into the token ids of a document.

They run in the worker processes, so they import nothing heavy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.kinds import INSTRUCTION_KEYS, WEIGHTS_KEY
from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.document import Document, Ids, utf8_size, written_sample, written_size
from glm3cli.data.preprocess.fields import Row, RowError, text_of, weight_of
from glm3cli.data.preprocess.preferences.handlers import PreferenceHandler
from glm3cli.data.preprocess.unread import CONTEXT, MEDIA
from glm3cli.data.tokens.chat import Template, truncate
from glm3cli.data.tokens.messages import Message
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError

# Reads the conversations that one row holds.
Conversations = Callable[[Row], list[list[Message]]]


@dataclass(frozen=True)
class TextHandler:
    """Turns the texts of a row into one document for each key, and an empty text into none.

    Attributes:
        tokenizer: The tokenizer.
        keys: The output keys, for each of which one pair of files is written. Without `compose`
            they are the columns of the texts.
        append_eod: Whether a text ends with the end token.
        compose: Makes the text of the only key from the whole row; None if the texts are columns.
        columns: The columns that `compose` needs.
        marker: What stands between the output prefix and the key in the names of files.
        side_keys: The keys whose tokens aren't counted; none.
        stride: The number of segment ids that a sample takes in a pack.
    """

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    append_eod: bool
    compose: Callable[[Row], str] | None = None
    columns: frozenset[str] = frozenset()
    marker: str = ""
    side_keys: frozenset[str] = frozenset()
    stride: int = 1

    @property
    def optional(self) -> frozenset[str]:
        """The columns that are read if a file has them."""
        return frozenset({"input"}) if self.compose else frozenset()

    @property
    def forms(self) -> tuple[frozenset[str], ...]:
        """Sets of columns; a file must have all columns of at least one set."""
        return (self.columns or frozenset(self.keys),)

    def encode(self, row: Row) -> Document:
        """Encodes the text of every key.

        Raises:
            RowError: A text is missing or isn't a string.
        """
        document = Document()
        for key in self.keys:
            text = self.compose(row) if self.compose else text_of(row, key)
            if text:
                ids = self.tokenizer.encode_array(text)
                end = [self.tokenizer.eos_id] if self.append_eod else []
                document.sequences[key] = [np.concatenate([self.tokenizer.prefix, ids, end])]
                document.text_bytes += utf8_size(text)
        return document


@dataclass(frozen=True)
class ConversationHandler:
    """Turns each conversation of a row into one sample: token ids, segment ids and labels.

    Attributes:
        tokenizer: The tokenizer.
        conversations: Reads the conversations of a row.
        forms: Sets of columns; a file must have all columns of at least one set.
        template: How a conversation is written; see `tokens.chat.build_sample`.
        append_eod: Whether a sample of the template `modellink` ends with the end token.
        seq_length: The longest sample in tokens, to which others are cut; None cuts nothing.
        keys: The output keys, for each of which one pair of files is written.
        marker: What stands between the output prefix and the key in the names of files.
        side_keys: The keys whose tokens aren't counted: they go with those of `input_ids`.
        optional: The columns that are read if a file has them.
        stride: The number of segment ids that a sample takes in a pack.
    """

    tokenizer: Tokenizer
    conversations: Conversations
    forms: tuple[frozenset[str], ...]
    template: Template
    append_eod: bool
    seq_length: int | None
    keys: tuple[str, ...] = (*INSTRUCTION_KEYS, WEIGHTS_KEY)
    marker: str = "_packed"
    side_keys: frozenset[str] = frozenset({"attention_mask", "labels", WEIGHTS_KEY})
    optional: frozenset[str] = frozenset(
        {"input", *rows.SYSTEM, "history", "tools", "functions", "weight", CONTEXT, *MEDIA}
    )
    stride: int = 1

    def encode(self, row: Row) -> Document:
        """Encodes all conversations of a row.

        Raises:
            RowError: The row isn't of the expected form, or has no assistant turn to train.
        """
        document, weight = Document(), weight_of(row)
        for messages in self._samples_of(row):
            document.text_bytes += written_size(self.tokenizer, messages)
            whole = written_sample(self.tokenizer, messages, self.template, self.append_eod)
            sample = truncate(self.tokenizer, whole, self.seq_length) if self.seq_length else whole
            if sample is None or not weight:
                document.num_dropped += 1
                continue
            document.num_truncated += sample is not whole
            segment_ids = [1] * len(sample.input_ids)
            bits = np.array([weight], dtype=np.float32).view(np.int32)
            values: tuple[Ids, ...] = (sample.input_ids, segment_ids, sample.labels, bits)
            for key, ids in zip(self.keys, values, strict=True):
                document.sequences.setdefault(key, []).append(ids)
        return document

    def _samples_of(self, row: Row) -> Iterator[list[Message]]:
        """Yields the turns of each sample: a conversation's, or those up to each of its answers.

        Raises:
            RowError: The row isn't of the expected form, or has no assistant turn to train.
        """
        for conversation in self.conversations(row):
            messages = self._up_to_last_trained(conversation)
            if self.template == "modellink" or self.tokenizer.chat.trains_all:
                yield messages
                continue
            for place, message in enumerate(messages):
                if message.role == "assistant" and message.loss:
                    yield messages[: place + 1]

    def _up_to_last_trained(self, messages: list[Message]) -> list[Message]:
        """Returns the turns of a conversation that a sample is made of.

        The template `modellink` writes all turns alike and trains what follows the last question,
        so for it they end with the last answer.

        Raises:
            RowError: There is no turn to train, or one that the template can't write.
        """
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if self.template == "modellink" and answers:
            messages, answers = messages[: answers[-1] + 1], answers[-1:]
            if any(message.metadata or message.tools for message in messages):
                problem = "has tools or calls of tools, which the template modellink can't write"
                raise RowError("row", f"{problem}: use --template chatglm3")
        if not any(messages[i].loss for i in answers):
            raise RowError("row", "expected at least one assistant turn to train on")
        return messages


Handler = TextHandler | ConversationHandler | PreferenceHandler


def choose_columns(handler: Handler, columns: Sequence[str]) -> list[str]:
    """Returns those of a file's columns that a handler reads.

    Raises:
        DataError: A needed column is missing; names the columns that the file has.
    """
    present = set(columns)
    if not any(form <= present for form in handler.forms):
        wanted = " or ".join(" + ".join(sorted(form)) for form in handler.forms)
        raise DataError(
            f"needs the column {wanted}, but has {', '.join(columns) or 'none'}",
            "choose another --handler" + (" or --json-keys" if not handler.marker else ""),
        )
    needed = handler.optional.union(*handler.forms)
    return [name for name in columns if name in needed]


def build_handler(config: PreprocessConfig, tokenizer: Tokenizer) -> Handler:
    """Returns the handler that `--handler` names, with the options of `config`."""
    if config.kind == "text":
        compose, columns = _TEXTS.get(config.handler, (None, ()))
        keys = ("text",) if compose else tuple(config.json_keys)
        return TextHandler(tokenizer, keys, config.append_eod, compose, frozenset(columns))
    template = config.conversation_template
    if config.kind in ("preference", "feedback"):
        return PreferenceHandler.of(config, tokenizer)
    if config.handler == "instruction":
        make: Conversations = partial(_alpaca, joined=template == "modellink")
        forms: tuple[frozenset[str], ...] = (_ALPACA,)
    else:
        make, forms = _CONVERSATIONS[config.handler]
    return ConversationHandler(
        tokenizer, make, forms, template, config.append_eod, config.seq_length
    )


def _alpaca(row: Row, joined: bool) -> list[list[Message]]:
    """Reads one question and one answer, without system and history, which only `chat` reads."""
    return [rows.alpaca({k: v for k, v in row.items() if k in _INSTRUCTION}, joined)]


def _any_chat(row: Row) -> list[list[Message]]:
    """Reads a conversation in the form that the columns of the row show."""
    for name, read in (
        ("messages", rows.openai),
        ("conversations", rows.share_gpt),
        ("conversation", rows.conversation),
        ("chat", rows.moss),
    ):
        if row.get(name) is not None:
            return [read(row)]
    if "instruction" in row:
        return [rows.alpaca(row, joined=False)]
    for asked, answered in _PAIRS:
        if asked in row and answered in row:
            return [rows.pair(row, asked, answered)]
    expected = "expected messages, conversations, instruction and output, or prompt and completion"
    raise RowError("row", f"{expected}; it has {', '.join(row) or 'nothing'}")


def _belle(row: Row) -> list[list[Message]]:
    return [rows.belle(row)]


def _leetcode(row: Row) -> list[list[Message]]:
    return [rows.leetcode(row)]


def _moss(row: Row) -> list[list[Message]]:
    return [rows.moss(row)]


def _moss_by_turn(row: Row) -> list[list[Message]]:
    """Makes one conversation for every answer: all turns up to it."""
    messages = rows.moss(row)
    return [messages[: i + 2] for i in range(0, len(messages), 2)]


_INSTRUCTION = ("instruction", "input", "output", *MEDIA)
_ALPACA = frozenset({"instruction", "output"})
# A question and its answer: as TRL and OpenAI, ms-swift, and THUDM's examples (AdvertiseGen) name
# them, and as data sets of questions do.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("content", "summary"),
)
_CHAT = (
    frozenset({"messages"}),
    frozenset({"conversations"}),
    frozenset({"conversation"}),
    _ALPACA,
    frozenset({"chat"}),
    *map(frozenset, _PAIRS),
)
_CODE = frozenset({"code_with_problem", "code_only", "explanation_only"})
_CONVERSATIONS: dict[str, tuple[Conversations, tuple[frozenset[str], ...]]] = {
    "chat": (_any_chat, _CHAT),
    "BelleMultiTurnInstructionHandler": (_belle, (_ALPACA,)),
    "MOSSInstructionHandler": (_moss_by_turn, (frozenset({"chat"}),)),
    "MOSSMultiTurnHandler": (_moss, (frozenset({"chat"}),)),
    "LeetcodePythonInstructionHandler": (_leetcode, (_CODE,)),
}
_TEXTS: dict[str, tuple[Callable[[Row], str], tuple[str, ...]]] = {
    "AlpacaPretrainHandler": (rows.alpaca_text, ("instruction", "output")),
    "StackOverflowPythonPretrainHandler": (
        rows.stack_overflow_text,
        ("title", "question_body", "answer_body"),
    ),
}
