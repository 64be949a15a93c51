"""The kinds of training data, and everything in which they differ.

`glm3 pretrain` reads running text and learns every token of it (`TEXT`). `glm3 finetune` reads
conversations and learns only their answers (`ANSWERS`), or learns what people prefer: from pairs of
a chosen and a rejected answer to the same prompt (`PAIRS`), or from single answers that were liked
or not (`FEEDBACK`). All code that depends on the kind asks the `DataKind` here; only
`samples.datasets.build_samples` chooses between two functions by it.

An answer with its prompt is a segment of a sample, and its segment id says what people think of it:
odd is good (chosen, liked), even is bad (rejected, disliked). A pair is a sample of two segments,
with the ids 1 and 2, and the samples of a pack count on from the next odd number.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm3cli.config.options.preference import Method

# A data set of instructions or preferences has one pair of files for each of these (ModelLink's
# names): the token ids, the segment ids, and the labels.
INSTRUCTION_KEYS = ("input_ids", "attention_mask", "labels")
# Instructions have one more pair if their samples don't weigh the same in the loss. Its sequences
# have a number for each sample of a document: the bits of its weight as fp32.
WEIGHTS_KEY = "weights"


def instruction_file(prefix: str, key: str) -> str:
    """Returns the path of one file pair of an instruction data set, without `.bin` and `.idx`.

    Args:
        prefix: The prefix of the data set, as `--data` takes it.
        key: One of `INSTRUCTION_KEYS`.
    """
    return ANSWERS.key_file(prefix, key)


@dataclass(frozen=True)
class DataKind:
    """A kind of training data: its command, its files, and how it is counted.

    Attributes:
        command: The subcommand of `glm3` that trains on this kind.
        methods: The values of `--method` that train on this kind; none for pretrain.
        marker: What stands between a prefix of `--data` and the key in the names of file pairs;
            "" for the one pair of a text, which has no key.
        handler: The `--handler` of `glm3 preprocess` that turns raw data into such files.
        output_suffix: What follows `--output-prefix` of `glm3 preprocess` in the prefix that
            `--data` takes.
        documents_are_samples: True if every document is one training sample; False if the
            documents are joined and the training cuts the joined tokens into samples.
        stride: The difference of the segment ids of successive samples in a pack.
    """

    command: str
    methods: tuple[Method, ...]
    marker: str
    handler: str
    output_suffix: str
    documents_are_samples: bool
    stride: int = 1

    @property
    def file_suffixes(self) -> tuple[str, ...]:
        """What follows a prefix of `--data` in the names of its file pairs, without their endings.

        The sequences of the first pair are the documents.
        """
        return tuple(self.key_file("", key) for key in INSTRUCTION_KEYS) if self.marker else ("",)

    @property
    def usage(self) -> str:
        """The command that trains on this kind, as a user types it."""
        if self.methods in ((), ("sft",)):
            return self.command
        return f"{self.command} --method {'|'.join(self.methods)}"

    def key_file(self, prefix: str, key: str) -> str:
        """Returns the path of one file pair of a `--data` prefix, without `.bin` and `.idx`.

        Args:
            prefix: The prefix of the data set.
            key: One of `INSTRUCTION_KEYS`.
        """
        return f"{prefix}{self.marker}_{key}_document"

    def file_names(self, prefix: str) -> list[str]:
        """Returns the paths of the file pairs of a `--data` prefix, without `.bin` and `.idx`."""
        return [f"{prefix}{suffix}" for suffix in self.file_suffixes]

    def present_files(self, prefix: str) -> list[str]:
        """Returns the paths of `file_names`, and of the weights of samples if there are any."""
        names = self.file_names(prefix)
        weights = self.key_file(prefix, WEIGHTS_KEY)
        return [*names, weights] if self.marker and Path(f"{weights}.idx").exists() else names

    def main_file(self, prefix: str) -> str:
        """Returns the path of the file pair that says how many documents and tokens there are."""
        return self.file_names(prefix)[0]

    def preprocess_settings(self, seq_length: int) -> dict[str, Any]:
        """Returns the options of `glm3 preprocess` that make raw data ready for a training.

        Texts end with the end token, which separates them once they are joined. Conversations are
        cut to the training's sequence length here, so that a cut one keeps its end token.

        Args:
            seq_length: The sequence length of the training, in tokens.
        """
        if self.documents_are_samples:
            return {"handler": self.handler, "seq_length": seq_length}
        return {"handler": self.handler, "append_eod": True}

    def data_prefix(self, output_prefix: str) -> str:
        """Returns the `--data` prefix of what preprocess writes for an `--output-prefix`."""
        return f"{output_prefix}{self.output_suffix}"

    def default_weight(self, samples: int, tokens: int) -> int:
        """Returns the weight in a blend of a data set whose weight isn't given: its size.

        Args:
            samples: The number of its training samples, where documents or packs of them are
                samples.
            tokens: The number of its training tokens.
        """
        return samples if self.documents_are_samples else tokens

    def epochs(self, samples: float, seq_length: int, size: int) -> float:
        """Returns how many times a training goes through a data set.

        Args:
            samples: The number of samples that the training takes from it.
            seq_length: The length of a sample, in tokens.
            size: Its size, as `default_weight` returns it.
        """
        return samples / size if self.documents_are_samples else samples * seq_length / size


TEXT = DataKind(
    command="pretrain",
    methods=(),
    marker="",
    handler="text",
    output_suffix="_text_document",
    documents_are_samples=False,
)
# The handler `chat` reads every form of instructions and conversations into ChatGLM3's template.
ANSWERS = DataKind(
    command="finetune",
    methods=("sft",),
    marker="_packed",
    handler="chat",
    output_suffix="",
    documents_are_samples=True,
)
PAIRS = DataKind(
    command="finetune",
    methods=("dpo", "orpo", "simpo"),
    marker="_pairs",
    handler="preference",
    output_suffix="",
    documents_are_samples=True,
    stride=2,
)
FEEDBACK = DataKind(
    command="finetune",
    methods=("kto",),
    marker="_feedback",
    handler="feedback",
    output_suffix="",
    documents_are_samples=True,
    stride=2,
)
KINDS = (ANSWERS, PAIRS, FEEDBACK, TEXT)


def kind_of(method: Method) -> DataKind:
    """Returns the kind of data that a method of finetune trains on."""
    return next(kind for kind in KINDS if method in kind.methods)
