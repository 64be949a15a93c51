"""Questions whose answer is a text: the model goes on with its own, which is compared."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm3cli.evals.prompts import Prompt
from glm3cli.evals.results import Answer

if TYPE_CHECKING:
    from glm3cli.data.tokens.tokenizer import Tokenizer
    from glm3cli.infer.engine import Engine


@dataclass(frozen=True)
class ExactRule:
    """How a text becomes an answer, and when that is right.

    Attributes:
        max_new_tokens: The length of the longest text, in tokens.
        stops: The strings before which a text ends.
        pattern: A regular expression whose last match holds the answer in its group; None takes
            the whole text.
        ignores_case: Whether capitals don't count.
    """

    max_new_tokens: int
    stops: tuple[str, ...] = ("\n",)
    pattern: str | None = None
    ignores_case: bool = False

    def answer_in(self, text: str) -> str | None:
        """Returns the answer in a text, with single spaces; None where the pattern finds none."""
        if self.pattern is None:
            return " ".join(text.split())
        found = [match[1] or "" for match in re.finditer(self.pattern, text)]
        return " ".join(found[-1].split()) if found else None

    def is_right(self, answer: str | None, right: Sequence[str]) -> bool:
        """Returns whether an answer equals one of the right texts, but for spaces."""

        def plain(text: str) -> str:
            one = " ".join(text.split())
            return one.casefold() if self.ignores_case else one

        return answer is not None and plain(answer) in map(plain, right)


class ExactJudge:
    """Has an engine go on after prompts, greedily, and compares what it says."""

    def __init__(
        self, engine: "Engine", tokenizer: "Tokenizer", rule: ExactRule, batch_size: int
    ) -> None:
        """Takes an engine, which runs `batch_size` texts side by side."""
        engine.limit(batch_size)
        self._engine, self._tokenizer, self._rule = engine, tokenizer, rule

    def ask(self, prompts: Sequence[Prompt], *, anew: bool) -> Callable[[], list[Answer]]:
        """Returns a function that has the prompts continued, and returns their answers.

        Args:
            prompts: The prompts.
            anew: Whether nothing that was read before may be used.
        """
        from glm3cli.infer.decoding.rules import Decoding
        from glm3cli.infer.decoding.stops import StopTexts
        from glm3cli.infer.model import stop_ids
        from glm3cli.infer.sampling import Sampling

        rule = self._rule
        decoding = Decoding(Sampling(), rule.max_new_tokens, stops=rule.stops, logprobs=None)
        stops = StopTexts(self._tokenizer, rule.stops)

        def answers() -> list[Answer]:
            if anew:
                self._engine.forget()
            ends = stop_ids(self._tokenizer)
            asked = [
                request
                for prompt in prompts
                for request in decoding.requests(prompt.token_ids, self._tokenizer, ends, seed=0)
            ]
            said = self._engine.answer(asked)
            texts = [stops.cut(self._tokenizer.decode(one.token_ids)) for one in said]
            return [self._read(*one) for one in zip(prompts, texts, strict=True)]

        return answers

    def _read(self, prompt: Prompt, text: str) -> Answer:
        """Reads the answer in what the model has said."""
        question = prompt.question
        answer = self._rule.answer_in(text)
        right = self._rule.is_right(answer, (question.answer, *question.also_right))
        return Answer((), answer, text, right)
