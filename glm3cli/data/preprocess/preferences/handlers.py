"""`PreferenceHandler` turns rows of preference data into samples of token ids."""

from dataclasses import dataclass

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.kinds import FEEDBACK, INSTRUCTION_KEYS, PAIRS, DataKind
from glm3cli.data.preprocess.document import Document, written_sample, written_size
from glm3cli.data.preprocess.fields import Row
from glm3cli.data.preprocess.preferences import rows
from glm3cli.data.tokens.chat import Template
from glm3cli.data.tokens.messages import IGNORED_LABEL, Message, Sample
from glm3cli.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreferenceHandler:
    """Turns a row into one sample: a pair of answers, or one answer that was liked or not.

    Each answer follows its prompt, and is a segment of its own; `data.kinds` says which segment id
    it has. The answer alone is trained.

    Attributes:
        tokenizer: The tokenizer.
        kind: The kind of data: pairs or feedback.
        template: How a conversation is written; see `tokens.chat.build_sample`.
        append_eod: Whether an answer of the template `modellink` ends with the end token.
        seq_length: The longest answer with its prompt in tokens; longer ones are cut, see
            `cut_prompts`. None cuts nothing.
        keys: The output keys, for each of which one pair of files is written.
        side_keys: The keys whose tokens aren't counted: they go with those of `input_ids`.
    """

    tokenizer: Tokenizer
    kind: DataKind
    template: Template
    append_eod: bool
    seq_length: int | None
    keys: tuple[str, ...] = INSTRUCTION_KEYS
    side_keys: frozenset[str] = frozenset({"attention_mask", "labels"})

    @classmethod
    def of(cls, config: PreprocessConfig, tokenizer: Tokenizer) -> "PreferenceHandler":
        """Returns the handler of a run of preprocess with these options."""
        kind = PAIRS if config.kind == "preference" else FEEDBACK
        template = config.conversation_template
        return cls(tokenizer, kind, template, config.append_eod, config.seq_length)

    @property
    def marker(self) -> str:
        """What stands between the output prefix and the key in the names of files."""
        return self.kind.marker

    @property
    def stride(self) -> int:
        """The number of segment ids that a sample takes in a pack."""
        return self.kind.stride

    @property
    def forms(self) -> tuple[frozenset[str], ...]:
        """Sets of columns; a file must have all columns of at least one set."""
        return rows.PAIR_FORMS if self.kind is PAIRS else rows.FEEDBACK_FORMS

    @property
    def optional(self) -> frozenset[str]:
        """The columns that are read if a file has them."""
        return rows.OPTIONAL

    def encode(self, row: Row) -> Document:
        """Encodes the answers of a row.

        Raises:
            RowError: The row has none of the forms of its kind.
        """
        if self.kind is PAIRS:
            pair = rows.pair(row)
            return self._document(pair.prompt, {1: pair.chosen, 2: pair.rejected})
        one = rows.feedback(row)
        return self._document(one.prompt, {1 if one.is_liked else 2: one.answer})

    def _document(self, prompt: list[Message], answers: dict[int, list[Message]]) -> Document:
        """Encodes a prompt with each of its answers, which are given by their segment ids."""
        said = [prompt, *answers.values()]
        turns = (turn for part in said for turn in part)
        document = Document(text_bytes=written_size(self.tokenizer, turns))
        whole = [
            written_sample(self.tokenizer, [*prompt, *answer], self.template, self.append_eod)
            for answer in answers.values()
        ]
        if len(whole) > 1 and whole[0].input_ids == whole[1].input_ids:
            document.num_equal += 1
            return document
        samples = cut_prompts(whole, len(self.tokenizer.prefix), self.seq_length)
        if samples is None:
            document.num_dropped += 1
            return document
        document.num_truncated += samples is not whole
        document.sequences = {
            "input_ids": [[token for sample in samples for token in sample.input_ids]],
            "attention_mask": [
                [
                    number
                    for number, sample in zip(answers, samples, strict=True)
                    for _ in sample.input_ids
                ]
            ],
            "labels": [[label for sample in samples for label in sample.labels]],
        }
        return document


def cut_prompts(samples: list[Sample], num_kept: int, length: int | None) -> list[Sample] | None:
    """Cuts the prompts of answers to one prompt from the left, by the same number of tokens.

    Answers stay whole, since they are compared as a whole, and the end of a prompt is what they
    answer.

    Args:
        samples: The answers with their prompts.
        num_kept: The number of tokens at the start of a prompt that are kept: the model's prefix.
        length: The largest number of tokens of a sample; None cuts nothing.

    Returns:
        The samples, the same list if all are short enough, or None if an answer alone, after the
        kept tokens and the token before it, is too long.
    """
    over = 0 if length is None else max(len(sample.input_ids) for sample in samples) - length
    if over <= 0:
        return samples
    for sample in samples:
        trained = (i for i, label in enumerate(sample.labels) if label != IGNORED_LABEL)
        if num_kept + over >= next(trained, 0):
            return None
    return [
        Sample(
            sample.input_ids[:num_kept] + sample.input_ids[num_kept + over :],
            sample.labels[:num_kept] + sample.labels[num_kept + over :],
        )
        for sample in samples
    ]
