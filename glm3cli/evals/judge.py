"""Answers a batch of questions by one forward pass of the model."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import CheckpointError
from glm3cli.evals.prompts import Prompt, answer_tokens
from glm3cli.evals.results import Answer
from glm3cli.evals.suite import LETTERS, Suite

if TYPE_CHECKING:
    from glm3cli.infer.engine import Engine

# How ModelLink 1.1 finds a letter in the text: by the first of these two that matches.
_LETTERS_IN_TEXT = (
    re.compile(r".*(?P<answer>[A|B|C|D])\..*"),
    re.compile(r"(?P<answer>[A|B|C|D])"),
)


def letter_in(text: str) -> str | None:
    """Returns the letter that ModelLink 1.1's rules find in `text`, or None."""
    for pattern in _LETTERS_IN_TEXT:
        if match := pattern.match(text.lstrip()):
            letter = match["answer"]
            return letter if letter in LETTERS else None  # its patterns also take a "|"
    return None


class Judge:
    """Asks an engine the questions of a suite, and reads its answers by the suite's rule."""

    def __init__(self, engine: "Engine", tokenizer: Tokenizer, suite: Suite) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._suite = suite
        self._letters = answer_tokens(suite, tokenizer)

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answers the questions of a batch of prompts, in their order, by one forward pass.

        Raises:
            CheckpointError: A log-probability of a letter is NaN.
        """
        prompt_ids = [prompt.token_ids for prompt in prompts]
        if self._suite.judge == "letters":
            rows = self._engine.next_logprobs(prompt_ids, self._letters)
            answers = [Answer(tuple(row), LETTERS[_largest(row)]) for row in rows]
        else:
            vocabulary = range(self._engine.model.padded_vocab_size)
            rows = self._engine.next_logprobs(prompt_ids, vocabulary)
            answers = [self._read(row) for row in rows]
        for prompt, answer in zip(prompts, answers, strict=True):
            _check_numbers(prompt, answer)
        return answers

    def _read(self, logprobs: Sequence[float]) -> Answer:
        """Reads the answer in the likeliest token, given the log-probability of each token id."""
        text = self._tokenizer.decode([_largest(logprobs)])
        scores = tuple(logprobs[token] for token in self._letters)
        return Answer(scores, letter_in(text), text)


def _largest(values: Sequence[float]) -> int:
    """Returns the position of the largest value; of equal ones, the first."""
    return max(range(len(values)), key=values.__getitem__)


def _check_numbers(prompt: Prompt, answer: Answer) -> None:
    if any(math.isnan(score) for score in answer.scores):
        question = prompt.question
        raise CheckpointError(
            f"the model gives NaN for question {question.index} of {question.subject}",
            "use --dtype bf16 or fp32 if this is fp16; otherwise the weights are damaged",
        )
