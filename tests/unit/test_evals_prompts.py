"""The text of the prompts, written out by hand, and the tokens that may follow it."""

# ruff: noqa: RUF001 - the prompts are Chinese, and so is their punctuation

import pytest

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from glm3cli.evals.judge import letter_in
from glm3cli.evals.prompts import answer_tokens, build_prompts, hash_texts
from glm3cli.evals.questions import Subject, read_subjects
from glm3cli.evals.suite import Question
from glm3cli.evals.suites.ceval import CEVAL
from glm3cli.evals.suites.cmmlu import CMMLU
from glm3cli.evals.suites.mmlu import MMLU, MODELLINK, suite_of
from tests.support.exam import exam_tokenizer
from tests.support.shared import SHARED, needs_shared
from tests.support.tiny_tokenizer import tiny_tokenizer

ASKED = Question("us_foreign_policy", 0, "Who {is} it?", ("None", "NA", "", "d e"), "C")
SHOTS = (
    Question("us_foreign_policy", 0, "One?", ("1", "2", "3", "4"), "A"),
    Question("us_foreign_policy", 1, "Two?", ("5", "6", "7", "8"), "D"),
)


def test_mmlu_prompt() -> None:
    assert MMLU.prompt(ASKED, SHOTS) == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n"
        "\n"
        "One?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n"
        "\n"
        "Two?\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer: D\n"
        "\n"
        "Who {is} it?\nA. None\nB. NA\nC. \nD. d e\nAnswer:"
    )


def test_mmlu_prompt_without_shots() -> None:
    assert MMLU.prompt(ASKED, ()) == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n"
        "\n"
        "Who {is} it?\nA. None\nB. NA\nC. \nD. d e\nAnswer:"
    )


def test_modellink_prompt() -> None:
    assert MODELLINK.prompt(ASKED, SHOTS) == (
        "The following are multiple choice questions (with answers) about  us foreign policy.\n"
        "One?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n"
        "Two?\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer: D\n"
        "\n"
        "Who {is} it?\nA. None\nB. NA\nC. \nD. d e\nAnswer:"
    )


def test_ceval_prompt() -> None:
    asked = Question("law", 0, "问？", ("一", "二", "三", "四"), "B")
    assert CEVAL.prompt(asked, [asked]) == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n"
        "\n"
        "问？\nA. 一\nB. 二\nC. 三\nD. 四\n答案：B\n"
        "\n"
        "问？\nA. 一\nB. 二\nC. 三\nD. 四\n答案："
    )


def test_cmmlu_prompt() -> None:
    asked = Question("agronomy", 0, "问？", ("一", "二", "三", "四"), "B")
    assert CMMLU.prompt(asked, [asked]) == (
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n"
        "\n"
        "题目：问？\nA. 一\nB. 二\nC. 三\nD. 四\n答案是：B\n"
        "\n"
        "题目：问？\nA. 一\nB. 二\nC. 三\nD. 四\n答案是："
    )


@needs_shared
@pytest.mark.parametrize("protocol", ["logits", "modellink"])
def test_prompts_of_astronomy(protocol: str) -> None:
    suite = suite_of(protocol)
    subject = read_subjects(suite, SHARED / "mmlu" / "data", ["astronomy"], num_shots=5)[0]
    text = suite.prompt(subject.questions[0], subject.shots)
    first_shot = (
        "You are pushing a truck along a road. Would it be easier to accelerate this truck on "
        "Mars? Why? (Assume there is no friction)\n"
        "A. It would be harder since the truck is heavier on Mars.\n"
        "B. It would be easier since the truck is lighter on Mars.\n"
        "C. It would be harder since the truck is lighter on Mars.\n"
        "D. It would be the same no matter where you are.\n"
        "Answer: D"
    )
    last_shot = (
        "Why is Mars red?\n"
        'A. Because the surface is covered with heavily oxidized ("rusted") minerals.\n'
        "B. Because the atmosphere scatters more light at bluer wavelengths transmitting mostly "
        "red light.\n"
        "C. Because Mars is covered with ancient lava flows which are red in color.\n"
        "D. Because flowing water on Mars's surface altered the surface minerals several billion "
        "years ago.\n"
        "Answer: A"
    )
    asked = (
        'What is true for a type-Ia ("type one-a") supernova?\n'
        "A. This type occurs in binary systems.\n"
        "B. This type occurs in young galaxies.\n"
        "C. This type produces gamma-ray bursts.\n"
        "D. This type produces high amounts of X-rays.\n"
        "Answer:"
    )
    start = "The following are multiple choice questions (with answers) about "
    if protocol == "logits":
        assert text.startswith(f"{start}astronomy.\n\n{first_shot}\n\nWhere do most short-period")
    else:
        assert text.startswith(f"{start} astronomy.\n{first_shot}\nWhere do most short-period")
    assert text.endswith(f"{last_shot}\n\n{asked}")


@needs_shared
def test_letters_are_the_tokens_that_continue_the_cue() -> None:
    tokenizer = Tokenizer.load(SHARED / "chatglm3-6b")
    names = [tokenizer.token_name(token) for token in answer_tokens(MMLU, tokenizer)]
    assert names == ["▁A", "▁B", "▁C", "▁D"]
    for suite in (CEVAL, CMMLU):
        names = [tokenizer.token_name(token) for token in answer_tokens(suite, tokenizer)]
        assert names == ["A", "B", "C", "D"]


@needs_shared
def test_letters_continue_whole_prompts_too() -> None:
    tokenizer = Tokenizer.load(SHARED / "chatglm3-6b")
    for suite in (MMLU, MODELLINK):
        tokens = answer_tokens(suite, tokenizer)
        for subject in read_subjects(suite, SHARED / "mmlu" / "data", limit=1):
            text = suite.prompt(subject.questions[0], subject.shots)
            ids = tokenizer.encode(text)
            for letter, token in zip("ABCD", tokens, strict=True):
                assert tokenizer.encode(f"{text} {letter}") == [*ids, token]


def test_refuses_a_tokenizer_that_splits_letters() -> None:
    with pytest.raises(DataError, match="does not write ' A' after 'Answer:' as one token"):
        answer_tokens(MMLU, tiny_tokenizer())


def test_prompts_start_with_gmask_and_sop() -> None:
    tokenizer = exam_tokenizer()
    (prompt,) = build_prompts(MMLU, [Subject("x", (ASKED,), SHOTS)], tokenizer, 4096)
    assert prompt.token_ids[:2] == tokenizer.prefix
    assert list(prompt.token_ids[2:]) == tokenizer.encode(MMLU.prompt(ASKED, SHOTS))
    assert (prompt.num_shots, prompt.over_length) == (2, False)


def test_long_prompts_lose_their_last_shots() -> None:
    tokenizer = exam_tokenizer()
    subject = Subject("x", (ASKED,), SHOTS)
    lengths = [2 + len(tokenizer.encode(MMLU.prompt(ASKED, SHOTS[:n]))) for n in range(3)]
    for room, num_shots, over_length in [
        (lengths[2], 2, False),
        (lengths[2] - 1, 1, False),
        (lengths[1] - 1, 0, False),
        (lengths[0] - 1, 0, True),
    ]:
        (prompt,) = build_prompts(MMLU, [subject], tokenizer, room)
        assert prompt.text == MMLU.prompt(ASKED, SHOTS[:num_shots])
        assert (prompt.num_shots, prompt.over_length) == (num_shots, over_length)


def test_hash_depends_on_where_texts_end() -> None:
    assert hash_texts(["ab", "c"]) != hash_texts(["a", "bc"])
    # printf 'ab\0c\0' | sha256sum
    expected = "629c2f14f654f026086f2aefe1855533d0897f49df86a19073be17b237361b09"
    assert hash_texts(["ab", "c"]) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" B", "B"),
        ("\nC", "C"),
        ("D. ", "D"),
        ("x B. y", "B"),
        ("A. or B.", "B"),
        ("A or B.", "B"),
        ("Apple", "A"),
        ("The answer is A", None),
        ("E", None),
        ("a", None),
        ("|", None),
        ("", None),
    ],
)
def test_letter_in_text_by_modellinks_rules(text: str, letter: str | None) -> None:
    assert letter_in(text) == letter
