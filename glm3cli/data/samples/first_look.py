"""A first look at the samples of a tuning: what is trained, how long they are, and what is wrong.

Most tunings that fail do so by their data: no answer teaches the model to end, most samples lose
their ends, or another tokenizer has made the files. It shows before the first step, from some
hundred samples and without torch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm3cli.data.indexed import read_lengths, read_tokens
from glm3cli.data.kinds import DataKind
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.fitting import fitting
from glm3cli.data.samples.splits import document_ranges
from glm3cli.data.samples.weighting import Weighting
from glm3cli.data.tokens.messages import IGNORED_LABEL, ROLES
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError

# How many samples of a data set are read; they are spread evenly over it.
_READ = 512
# How many tokens of a run of trained or untrained ones are shown, half of them at its end.
_SHOWN = 40
_TOO_MANY_CUT = 0.5  # share of the samples


@dataclass(frozen=True)
class Document:
    """A sample as it is trained.

    Attributes:
        number: Its number in the data set.
        ids: The token ids.
        trained: Whether each of them is trained.
        segment_ids: The sample that each belongs to, where it is a pack.
    """

    number: int
    ids: np.ndarray
    trained: np.ndarray
    segment_ids: np.ndarray


@dataclass(frozen=True)
class FirstLook:
    """Looks at the training samples of data sets.

    Attributes:
        kind: The kind of data.
        split: The proportions of training, validation and test documents, such as "949,50,1".
        seq_length: The length of a sample, in tokens.
        tokenizer: The tokenizer of the training.
        weighting: Which tokens are trained.
        preview: The number of samples of each data set that are shown.
    """

    kind: DataKind
    split: str
    seq_length: int
    tokenizer: Tokenizer
    weighting: Weighting
    preview: int

    def lines(self, blend: Blend) -> Iterator[str]:
        """Yields what there is to say about each data set, a line each; warnings say so.

        Raises:
            DataError: The files have ids that the tokenizer doesn't, or packs whose samples can't
                be told apart.
        """
        for prefix in dict.fromkeys(blend.prefixes):
            yield from self._about(prefix)

    def _about(self, prefix: str) -> Iterator[str]:
        """Yields the lines about one data set."""
        lengths = read_lengths(self.kind.main_file(prefix), f"--data {prefix}")
        train, _ = document_ranges(len(lengths), self.split, prefix, needs_valid=False)
        found = fitting(prefix, train, self.seq_length, self.kind)
        places = np.linspace(0, len(found.kept) - 1, min(_READ, len(found.kept))).astype(np.int64)
        documents = list(self._read(prefix, lengths, found.kept[places]))
        self._check(prefix, documents)
        for number, document in enumerate(documents[: self.preview], 1):
            yield f"sample {number} of {prefix}: document {document.number}"
            yield from self._shown(document)
        kept = lengths[found.kept]
        middle, most = np.percentile(kept, (50, 95))
        trained = np.concatenate([document.trained for document in documents])
        yield (
            f"{prefix}: samples of {kept.min():,} to {kept.max():,} tokens, half of them up to "
            f"{middle:,.0f}, 95% up to {most:,.0f}; {trained.mean():.1%} of the tokens are "
            f"trained; {found.cut / len(kept):.1%} of the samples are cut"
        )
        for warning in self._warnings(prefix, documents, found.cut / len(kept)):
            yield f"warning: {prefix}: {warning}"

    def _read(self, prefix: str, lengths: np.ndarray, numbers: np.ndarray) -> Iterator[Document]:
        """Reads documents, cut to the sequence length."""
        ends = np.cumsum(lengths, dtype=np.int64)
        files = {
            key: read_tokens(self.kind.key_file(prefix, key), f"--data {prefix}")
            for key in ("input_ids", "labels", "attention_mask")
        }
        for number in numbers.tolist():
            start = int(ends[number] - lengths[number])
            stop = min(int(ends[number]), start + self.seq_length + 1)
            ids, labels, segment_ids = (np.asarray(file[start:stop]) for file in files.values())
            labels = np.concatenate([[IGNORED_LABEL], labels[1:]])  # nothing predicts the first
            trained = self.weighting.of(labels, segment_ids) > 0
            yield Document(number, ids, trained, segment_ids)

    def _check(self, prefix: str, documents: Sequence[Document]) -> None:
        """Checks that the tokenizer knows all ids, and that packs tell their samples apart.

        Raises:
            DataError: It doesn't, or they don't.
        """
        begin = np.array(self.tokenizer.prefix)
        for document in documents:
            largest = int(document.ids.max(initial=0))
            if largest >= self.tokenizer.vocab_size:
                raise DataError(
                    f"--data {prefix}: sample {document.number} has token id {largest}, but "
                    f"{self.tokenizer.path} has {self.tokenizer.vocab_size:,}: another tokenizer "
                    "has made the files",
                    "preprocess the data with the model's tokenizer",
                )
            starts = _occurrences(document.ids, begin)
            inner = starts[starts > 0]
            if (document.segment_ids[inner] == document.segment_ids[inner - 1]).any():
                raise DataError(
                    f"--data {prefix}: sequence {document.number} holds several samples, but its "
                    "attention_mask doesn't tell them apart: each would see those before it",
                    "pack by `glm3 preprocess --pack`, or give unpacked files and --packing",
                )

    def _shown(self, document: Document) -> Iterator[str]:
        """Yields the ids and pieces of a sample, a line for each run of trained or other tokens."""
        edges = np.flatnonzero(np.diff(document.trained)) + 1
        for run in np.split(np.arange(len(document.ids)), edges):
            is_trained = bool(document.trained[run[0]])
            half = _SHOWN // 2
            parts = [run] if len(run) <= _SHOWN else [run[:half], run[-half:]]
            words = [
                " ".join(f"{one}:{self.tokenizer.token_name(one)}" for one in document.ids[part])
                for part in parts
            ]
            between = f" ... {len(run) - _SHOWN:,} more ... "
            yield f"  {'trained' if is_trained else '-':7}  {between.join(words)}"

    def _warnings(
        self, prefix: str, documents: Sequence[Document], share_cut: float
    ) -> Iterator[str]:
        """Yields what will make a bad model, as sentences."""
        several = len(documents) > 1
        ends = {self.tokenizer.eos_id}
        roles = {f"<|{role}|>" for role in ROLES}
        ends |= {i for name, i in self.tokenizer.special_tokens.items() if name in roles}
        if not any(document.trained[-1] and document.ids[-1] in ends for document in documents):
            yield (
                "no sample ends with a trained end token or role, so the model won't learn to end "
                "its answers; preprocess with --handler chat, or with --append-eod"
            )
        answers = {document.ids[document.trained].tobytes() for document in documents}
        if several and len(answers) == 1:
            yield "all samples that were looked at train the same tokens"
        if share_cut > _TOO_MANY_CUT:
            yield f"{share_cut:.0%} of the samples lose their ends; give a larger --seq-length"
        prefix_ids = np.array(self.tokenizer.prefix)
        without = sum(
            not np.array_equal(document.ids[: len(prefix_ids)], prefix_ids)
            for document in documents
        )
        if without:
            yield (
                f"{without:,} of {len(documents):,} samples don't begin with [gMASK] sop: another "
                "tokenizer may have made them"
            )
        made_by = _tokenizer_of(prefix)
        if made_by is not None and made_by != self.tokenizer.sha256:
            yield f"another tokenizer.model than {self.tokenizer.path} has made the files"


def _occurrences(ids: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Returns the positions at which a pattern of ids begins."""
    if len(ids) < len(pattern):
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
    return np.flatnonzero((windows == pattern).all(axis=1))


def _tokenizer_of(prefix: str) -> str | None:
    """Returns the SHA-256 of the tokenizer that preprocess has noted; None if there is no note."""
    try:
        stats = json.loads(Path(f"{prefix}.stats.json").read_text("utf-8"))
        return str(stats["job"]["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
