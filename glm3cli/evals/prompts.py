"""Builds the prompts of a benchmark: token ids that fit into the model's sequences.

Also finds the tokens that stand for the letters after a prompt.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm3cli.errors import DataError
from glm3cli.evals.questions import Subject
from glm3cli.evals.suite import LETTERS, Question, Suite

if TYPE_CHECKING:
    from glm3cli.data.tokens.tokenizer import Tokenizer

# From so many questions on, the fast encoder saves more time than it takes to load.
_MANY = 2000


@dataclass(frozen=True)
class Prompt:
    """The prompt for one question.

    Attributes:
        question: The question that is asked.
        text: The prompt's text: header, shots, question, and cue; see `Suite.prompt` for a chat.
        token_ids: `[gMASK] sop`, and the tokens of the text or of the turns of a chat.
        num_shots: The number of shots that fit into the prompt.
        over_length: Whether the prompt is longer than the model's sequences even without shots.
    """

    question: Question
    text: str
    token_ids: tuple[int, ...]
    num_shots: int
    over_length: bool = False


def build_prompts(
    suite: Suite, subjects: Sequence[Subject], tokenizer: "Tokenizer", max_tokens: int
) -> list[Prompt]:
    """Builds one prompt per question, in the order of the subjects and of their questions.

    A prompt of more than `max_tokens` tokens loses its last shot until it fits, as in Hendrycks'
    code; the question itself is never cut.
    """
    if sum(len(subject.questions) for subject in subjects) >= _MANY:
        tokenizer.use_fast_encoder()
    return [
        _fitted(suite, question, subject.shots, tokenizer, max_tokens)
        for subject in subjects
        for question in subject.questions
    ]


def _fitted(
    suite: Suite,
    question: Question,
    shots: Sequence[Question],
    tokenizer: "Tokenizer",
    max_tokens: int,
) -> Prompt:
    num_shots = len(shots)
    while True:
        token_ids = _encoded(suite, question, shots[:num_shots], tokenizer)
        fits = len(token_ids) <= max_tokens
        if fits or num_shots == 0:
            text = suite.prompt(question, shots[:num_shots])
            return Prompt(question, text, tuple(token_ids), num_shots, not fits)
        num_shots -= 1


def _encoded(
    suite: Suite, question: Question, shots: Sequence[Question], tokenizer: "Tokenizer"
) -> list[int]:
    """Returns the token ids of a prompt."""
    if not suite.is_chat:
        return [*tokenizer.prefix, *tokenizer.encode(suite.prompt(question, shots))]
    from glm3cli.data.tokens.chat import begin_turn
    from glm3cli.data.tokens.messages import Message

    turns = [Message(role, text) for role, text in suite.turns(question, shots)]
    return begin_turn(tokenizer, turns)


def hash_texts(texts: Iterable[str]) -> str:
    """Returns the SHA-256 (in hex) of the texts in their order, each followed by a zero byte."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def answer_tokens(suite: Suite, tokenizer: "Tokenizer", count: int = 4) -> list[int]:
    """Returns the ids of the tokens that continue the suite's cue as the first letters.

    Args:
        suite: The benchmark.
        tokenizer: The model's tokenizer.
        count: The number of letters, from A on.

    Raises:
        DataError: The tokenizer doesn't encode a letter after the cue as one token of its own.
    """
    cue = tokenizer.encode(suite.cue)
    tokens = []
    for letter in LETTERS[:count]:
        continued = tokenizer.encode(suite.cue + suite.gap + letter)
        if continued[:-1] != cue:
            raise DataError(
                f"{tokenizer.path} does not write {suite.gap + letter!r} after {suite.cue!r} as "
                "one token of its own",
                f"{suite.name} needs that; give the tokenizer.model that belongs to the model",
            )
        tokens.append(continued[-1])
    return tokens
