"""Benchmarks of the model that trains: --eval-suite of pretrain and finetune.

Questions go through the training's own forward pass, at all its parallel sizes and with its
adapters, so that no second copy of the model is made. What the output layer gives at the end of
each prompt says which letter is the likeliest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.config.model import ModelConfig
from glm3cli.data.samples.loader import Batch, Loader
from glm3cli.data.samples.padding import Padding
from glm3cli.data.samples.spec import Sample, VariedDataset
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.evals.prompts import Prompt, answer_tokens, build_prompts
from glm3cli.evals.questions import Subject
from glm3cli.evals.suite import LETTERS, Suite
from glm3cli.model.build import unwrap
from glm3cli.train.objective import Losses
from glm3cli.train.step import TrainStep

# Prompts are padded to a multiple of so many tokens for each rank that shares a sequence.
_MULTIPLE = 8


class AskedQuestions:
    """The prompts of a benchmark as samples: the right letter is the label at a prompt's end."""

    def __init__(self, prompts: Sequence[Prompt], letters: Sequence[int]) -> None:
        """Takes the prompts, and the ids of the letters' tokens."""
        self._prompts, self._letters = prompts, letters

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Sample:
        prompt = self._prompts[min(index, len(self) - 1)]
        tokens = np.array(prompt.token_ids, dtype=np.int64)
        labels, mask = np.zeros_like(tokens), np.zeros(len(tokens), dtype=np.float32)
        labels[-1] = self._letters[LETTERS.index(prompt.question.answer)]
        mask[-1] = index < len(self)  # what is read after the last one doesn't count
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "segment_ids": np.ones_like(tokens),
        }

    def locate(self, index: int) -> tuple[VariedDataset, int]:
        """Returns this dataset and the position."""
        return self, index

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the number of tokens of each of some prompts, int64 [len(indices)]."""
        return np.array([len(self[index]["tokens"]) for index in indices], dtype=np.int64)


@dataclass(frozen=True)
class SuiteProbe:
    """Scores the model that trains on a benchmark.

    Attributes:
        name: The benchmark's name, which the score has behind `eval suite/`.
        prompts: The prompts, the longest first, so that a lack of memory shows at once.
        letters: The ids of the letters' tokens.
    """

    name: str
    prompts: Sequence[Prompt]
    letters: Sequence[int]

    @classmethod
    def of(
        cls, suite: Suite, subjects: Sequence[Subject], tokenizer: Tokenizer, max_tokens: int
    ) -> "SuiteProbe":
        """Returns the probe of a benchmark.

        Args:
            suite: The benchmark.
            subjects: Its questions.
            tokenizer: The tokenizer of the training.
            max_tokens: The length of the longest sequence of the training, in tokens. Questions
                that are longer even without shots are left out.

        Raises:
            DataError: A letter isn't one token of the tokenizer.
        """
        prompts = build_prompts(suite, subjects, tokenizer, max_tokens)
        fitting = [prompt for prompt in prompts if not prompt.over_length]
        most = max((len(prompt.question.choices) for prompt in fitting), default=0)
        ordered = sorted(fitting, key=lambda prompt: -len(prompt.token_ids))
        return cls(suite.name, ordered, answer_tokens(suite, tokenizer, most))

    def look(self, train_step: TrainStep, loader: Loader) -> dict[str, float]:
        """Returns the share of right answers; see `train.probe.Probe`."""
        if not self.prompts:
            return {}
        name = f"eval suite/{self.name}"
        multiple = _MULTIPLE * train_step.grid.tp_size * train_step.grid.cp_size
        reader = replace(
            loader,
            dataset=AskedQuestions(self.prompts, self.letters),
            sources=("",),
            padding=Padding(multiple),
            noise=None,
            needs_all=False,
        )
        with _logits(train_step) as seen:
            judge = partial(self._judge, train_step.grid.tp_group, seen, name)
            size, right, count = reader.global_batch_size, 0.0, 0.0
            for first in range(0, len(self.prompts), size):
                totals = train_step.score(judge, (name,), reader, first)
                right += totals.by_name[name][0]
                count += totals.by_name[name][1]
        return {name: right / count}

    def _judge(
        self, tp_group: Any, seen: list[Tensor], name: str, batch: Batch, of_tokens: Tensor
    ) -> Losses:
        """Returns no losses, and a report of how many questions of a micro-batch are right.

        Args:
            tp_group: The tensor parallel group, whose ranks have parts of the vocabulary.
            seen: What the output layer has given for the micro-batch, as its last element.
            name: The name of the score.
            batch: The micro-batch.
            of_tokens: The loss of each token, which isn't needed.
        """
        logits = seen.pop().flatten(0, 1)  # [places, vocabulary / tp]
        places = batch.needed
        if places is None:
            places = torch.arange(len(logits), device=logits.device)
        asked = batch.loss_mask.T.flatten()[places] > 0
        labels = batch.labels.T.flatten()[places][asked]
        letters = torch.tensor(self.letters, device=logits.device)
        found = _of_letters(logits[asked].float(), letters, tp_group)
        right = (letters[found.argmax(dim=-1)] == labels).sum()
        nothing = of_tokens.new_zeros(())
        pair = torch.stack([right, asked.sum()]).to(torch.float32)
        return nothing, nothing.to(torch.int), {name: pair, "loss": pair * 0}


def _of_letters(logits: Tensor, letters: Tensor, tp_group: Any) -> Tensor:
    """Returns the logits of the letters, [n, vocabulary / tp] -> [n, letters], on all ranks."""
    size = logits.size(-1)
    own = letters - dist.get_rank(tp_group) * size
    is_here = (own >= 0) & (own < size)
    found = torch.where(is_here, logits[:, own.clamp(0, size - 1)], -torch.inf)
    if dist.get_world_size(tp_group) > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=tp_group)
    return found


@contextmanager
def _logits(train_step: TrainStep) -> Iterator[list[Tensor]]:
    """Collects what the output layer gives, one tensor for each micro-batch of the last stage."""
    seen: list[Tensor] = []
    models = [unwrap(chunk) for chunk in train_step.chunks]
    handles = [
        model.output_layer.register_forward_hook(
            lambda _module, _given, output: seen.append(output[0].detach())
        )
        for model in models
        if model.post_process
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def make_probes(
    suites: Sequence[tuple[Suite, Sequence[Subject]]],
    model: ModelConfig,
    tokenizer: Tokenizer,
    loader: Loader,
) -> list[SuiteProbe]:
    """Returns the probes of benchmarks; see `train.probe.MakeProbes`."""
    room = min(model.seq_length, loader.seq_length)
    return [SuiteProbe.of(suite, subjects, tokenizer, room) for suite, subjects in suites]
