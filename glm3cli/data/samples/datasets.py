"""Builds the samples of a training: of text by megatron-core's GPTDataset, of instructions by ours.

`build_samples` makes both kinds; `spec` says what a sample is.
"""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from glm3cli.data.index_cache import index_folder
from glm3cli.data.kinds import ANSWERS, FEEDBACK, PAIRS, TEXT, DataKind
from glm3cli.data.samples.instructions import build_instruction
from glm3cli.data.samples.preferences import build_feedback, build_pairs
from glm3cli.data.samples.spec import Dataset, DataSpec, open_tokens
from glm3cli.data.samples.splits import document_ranges
from glm3cli.data.tokens.tokenizer import Tokenizer


def build_samples(
    kind: DataKind, spec: DataSpec, tokenizer: Tokenizer
) -> tuple[Dataset, Dataset | None]:
    """Builds the samples of a training.

    Args:
        kind: The kind of data, which decides how samples are made of documents.
        spec: The data and the number of samples.
        tokenizer: The tokenizer of the data.

    Returns:
        The training samples, and the validation samples or None if `spec` asks for none.

    Raises:
        DataError: A split has no document, or a file is damaged.
    """
    build = {
        TEXT: build_text,
        ANSWERS: build_instruction,
        PAIRS: build_pairs,
        FEEDBACK: build_feedback,
    }[kind]
    return build(spec, tokenizer)


def build_text(spec: DataSpec, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Builds samples of text: the documents are joined in random order and cut to `seq_length`.

    The arguments and the result are those of `build_samples`.

    Raises:
        DataError: A split has no document, or a file is damaged.
    """
    # The indices stay in memory unless `preprocess --build-index` has built exactly these. If
    # megatron-core wrote them beside the data, it would read them even after the data was
    # preprocessed again, and they would be missing on a machine with another disk than rank 0's.
    folder = _index_folder(spec, tokenizer)
    return _build_text(spec, tokenizer, str(folder) if folder and folder.is_dir() else "")


def build_index(spec: DataSpec, tokenizer: Tokenizer) -> Path:
    """Builds the sample indices of one text data set beside it, for trainings of equal options.

    Args:
        spec: The data, a single data set, and the number of samples.
        tokenizer: The tokenizer of the data.

    Returns:
        The folder of the indices, which is left alone if it exists.

    Raises:
        DataError: A split has no document.
    """
    folder = _index_folder(spec, tokenizer)
    assert folder is not None, "a blend has no indices of its own"
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _build_text(spec, tokenizer, str(partial))
        partial.rename(folder)
    return folder


def _index_folder(spec: DataSpec, tokenizer: Tokenizer) -> Path | None:
    """Returns the folder for indices of a text data set; None for a blend of several."""
    if len(spec.blend.prefixes) > 1:
        return None
    settings = {name: value for name, value in asdict(spec).items() if name != "blend"}
    settings["tokenizer"] = tokenizer.unique_identifiers
    return index_folder(spec.blend.prefixes[0], settings)


def _build_text(
    spec: DataSpec, tokenizer: Tokenizer, path_to_cache: str
) -> tuple[Dataset, Dataset | None]:
    """Builds samples of text with indices in the folder `path_to_cache`, or in memory for ""."""
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    config = GPTDatasetConfig(
        random_seed=spec.seed,
        sequence_length=spec.seq_length,
        blend=_text_blend(spec),
        split=spec.split,
        path_to_cache=path_to_cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # Build only the splits that are read; the others' proportions still count.
    config.split_matrix[2] = None
    if not spec.num_valid:
        config.split_matrix[1] = None
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [spec.num_train, spec.num_valid, 0], lambda: True, config
    )
    train, valid, _ = builder.build()
    return train, valid


def _text_blend(spec: DataSpec) -> tuple[list[str], list[float] | None]:
    """Returns the prefixes and weights of a blend of texts in the form that megatron-core takes.

    Weights that aren't given are the numbers of training tokens: without weights megatron-core's
    own samples end after one epoch.
    """
    num_tokens = []
    for prefix in spec.blend.prefixes:
        file = open_tokens(prefix)
        train, _ = document_ranges(len(file), spec.split, prefix, needs_valid=bool(spec.num_valid))
        num_tokens.append(float(file.sequence_lengths[train.start : train.stop].sum()))
    prefixes = [str(Path(prefix).absolute()) for prefix in spec.blend.prefixes]
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, list(spec.blend.weights or num_tokens)
