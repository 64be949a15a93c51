"""The word lists of the demo: pairs of opposites, and the subjects of its mini-MMLU.

`content` and `quiz` build documents, instructions and questions from these tables. Every word
here is one piece of the demo's tokenizer, so that the tiny model reads and writes it as one token.
"""

from dataclasses import dataclass

# Each word is the opposite of the other word of its pair.
OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"),
    ("tall", "short"),
    ("fast", "slow"),
    ("old", "new"),
    ("big", "small"),
    ("wet", "dry"),
    ("hard", "soft"),
    ("dark", "light"),
    ("full", "empty"),
    ("high", "low"),
    ("loud", "quiet"),
    ("rich", "poor"),
    ("early", "late"),
    ("open", "closed"),
    ("strong", "weak"),
    ("near", "far"),
    ("clean", "dirty"),
    ("sweet", "sour"),
    ("thick", "thin"),
    ("happy", "sad"),
    ("good", "bad"),
    ("wide", "narrow"),
    ("sharp", "blunt"),
    ("smooth", "rough"),
)


@dataclass(frozen=True, kw_only=True)
class WordSubject:
    """A subject of the mini-MMLU: which kind is a word of? One fact per word answers it.

    Attributes:
        wordings: The forms of the question for the kind of `{word}`.
        statement: The form of a fact, with `{word}` and `{kind}`, as documents state it.
        kinds: The words of each kind. The kinds are the four options of every question, in this
            order.
    """

    wordings: tuple[str, ...]
    statement: str
    kinds: dict[str, tuple[str, ...]]


SUBJECTS: dict[str, WordSubject] = {
    "animals": WordSubject(
        wordings=(
            "What does the {word} do?",
            "How does the {word} move?",
            "What can the {word} do?",
        ),
        statement="The {word} {kind}.",
        kinds={
            "flies": ("owl", "crow"),
            "swims": ("fish", "trout"),
            "runs": ("horse", "fox"),
            "crawls": ("snake", "worm"),
        },
    ),
    "food": WordSubject(
        wordings=(
            "What kind of food is the {word}?",
            "What is the {word}?",
            "What do we call the {word}?",
        ),
        statement="The {word} is a {kind}.",
        kinds={
            "fruit": ("apple", "pear"),
            "root": ("carrot", "turnip"),
            "grain": ("wheat", "rye"),
            "drink": ("milk", "tea"),
        },
    ),
    "house": WordSubject(
        wordings=(
            "Where do we keep the {word}?",
            "Where is the {word}?",
            "Where can we find the {word}?",
        ),
        statement="We keep the {word} in the {kind}.",
        kinds={
            "kitchen": ("spoon", "kettle"),
            "garden": ("rake", "spade"),
            "bedroom": ("pillow", "quilt"),
            "workshop": ("hammer", "saw"),
        },
    ),
}
