"""Answers a batch of questions by reading their prompts once."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import CheckpointError
from glm3cli.evals.prompts import Prompt, answer_tokens
from glm3cli.evals.results import Answer
from glm3cli.evals.suite import LETTERS, Suite

if TYPE_CHECKING:
    from glm3cli.infer.engine import Engine


def letter_in(text: str, letters: Sequence[str] = LETTERS[:4]) -> str | None:
    """Returns the letter that ModelLink 1.1's rules find in `text`, or None.

    It looks for a letter before a dot, and else for one at the text's beginning.
    """
    one_of = f"(?P<answer>[{'|'.join(letters)}])"
    for pattern in (rf".*{one_of}\..*", one_of):
        if match := re.match(pattern, text.lstrip()):
            letter = match["answer"]
            return letter if letter in letters else None  # its patterns also take a "|"
    return None


class Judge:
    """Asks an engine the questions of a suite, and reads its answers by the suite's rule."""

    def __init__(
        self, engine: "Engine", tokenizer: Tokenizer, suite: Suite, num_letters: int = 4
    ) -> None:
        """Finds the letters' tokens.

        Args:
            engine: The model.
            tokenizer: The model's tokenizer.
            suite: The benchmark.
            num_letters: The number of options of the question that has the most.

        Raises:
            DataError: A letter isn't one token of the tokenizer.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._suite = suite
        self._letters = answer_tokens(suite, tokenizer, num_letters)

    def ask(self, prompts: Sequence[Prompt], *, anew: bool) -> Callable[[], list[Answer]]:
        """Asks the questions of a batch of prompts.

        Args:
            prompts: The prompts.
            anew: Whether nothing that was read before may be used.

        Returns:
            A function that waits for the answers, and returns them in the order of the prompts. It
            raises CheckpointError if a log-probability of a letter is NaN.
        """
        if anew:
            self._engine.forget()
        wait = self._engine.ask_next([prompt.token_ids for prompt in prompts], self._letters)

        def answers() -> list[Answer]:
            found = zip(prompts, wait(), strict=True)
            return [self._read(prompt, next_.logprobs, next_.likeliest) for prompt, next_ in found]

        return answers

    def _read(self, prompt: Prompt, logprobs: Sequence[float], likeliest: int) -> Answer:
        """Reads the answer to a prompt from what the model expects after it."""
        question = prompt.question
        scores = tuple(logprobs[: len(question.choices)])
        if any(math.isnan(score) for score in scores):
            raise CheckpointError(
                f"the model gives NaN for question {question.index} of {question.subject}",
                "use --dtype bf16 or fp32 if this is fp16; otherwise the weights are damaged",
            )
        if self._suite.judge == "letters":
            return Answer(scores, LETTERS[_largest(scores)])
        text = self._tokenizer.decode([likeliest])
        return Answer(scores, letter_in(text, question.letters), text)


def _largest(values: Sequence[float]) -> int:
    """Returns the position of the largest value; of equal ones, the first."""
    return max(range(len(values)), key=values.__getitem__)
