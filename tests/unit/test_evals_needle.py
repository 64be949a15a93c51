"""Needles in haystacks: where they lie, how long texts are, and what is counted."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.evaluation import NeedleConfig
from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.needle import make_needles, run_needle
from tests.support.exam import FakeEngine, FakeModel, exam_tokenizer
from tests.support.report_page import read_page

TOKENIZER = exam_tokenizer()


def _config(tmp_path: Path, **more: Any) -> NeedleConfig:
    options = {"model": tmp_path, "output": tmp_path / "needle.json", "lengths": "600,900"}
    return NeedleConfig.parse(options | more)


def test_a_needle_lies_at_its_depth_of_a_text_of_its_length(tmp_path: Path) -> None:
    config = _config(tmp_path, depths="0,50,100", needles=2)
    needles = list(make_needles(TOKENIZER, config.length_numbers, config))
    assert [(one.length, one.depth) for one in needles[:4]] == [
        (600, 0),
        (600, 50),
        (600, 100),
        (600, 0),
    ]
    assert len(needles) == 2 * 2 * 3
    for one in needles:
        assert len(one.context) + len(one.answer) == one.length
        assert tuple(one.context[:2]) == TOKENIZER.prefix
        text, number = TOKENIZER.decode(one.context), TOKENIZER.decode(one.answer).strip()
        assert text.count(number) == 1
        fact = re.search(rf"The secret number of (\w+) is {number}\.", text)
        assert fact is not None
        name = fact[1]
        assert text.endswith(f"Question: What is the secret number of {name}?\nAnswer: It is")
        share = fact.start() / text.index("Question:")
        assert share == pytest.approx(one.depth / 100, abs=0.15)
    again = list(make_needles(TOKENIZER, config.length_numbers, config))
    assert again == needles
    other = _config(tmp_path, depths="0,50,100", needles=2, seed=7)
    assert list(make_needles(TOKENIZER, other.length_numbers, other)) != needles


def test_a_haystack_of_ones_own(tmp_path: Path) -> None:
    config = _config(tmp_path, depths="50", needles=1, lengths="400")
    [needle] = make_needles(TOKENIZER, [400], config, "one two three\n\nfour five\n")
    assert "one two three four five one two" in TOKENIZER.decode(needle.context)
    with pytest.raises(DataError, match="has no text"):
        next(make_needles(TOKENIZER, [400], config, "\n \n"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lengths": "60"}, "--lengths 60 is too short for a needle"),
        ({"lengths": "5000"}, "--lengths 5000 is more than the model's 1,000 positions"),
        ({"lengths": "x"}, "'x' is no whole number"),
        ({"depths": "0,101"}, "a depth is a percentage"),
        ({"depths": ","}, "give at least one number"),
        ({"haystack": "none.txt"}, "--haystack none.txt"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    model = FakeModel(FakeEngine(TOKENIZER, seq_length=1000))
    monkeypatch.setattr("glm3cli.evals.needle.open_here", lambda _config: model)
    with pytest.raises((ConfigError, DataError), match=sentence):
        run_needle(_config(tmp_path, **options))


def test_what_is_found_is_counted_by_length_and_depth(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = FakeEngine(TOKENIZER, seq_length=700)

    def ask(
        contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> Callable[[], list[tuple[float, bool]]]:
        """Finds what is in the last half of a text."""

        def found(context: Sequence[int], number: Sequence[int]) -> bool:
            half = TOKENIZER.decode(context[len(context) // 2 :])
            return TOKENIZER.decode(number).strip() in half

        pairs = list(zip(contexts, continuations, strict=True))
        return lambda: [(-1.0, found(*pair)) for pair in pairs]

    monkeypatch.setattr(engine, "ask_continuations", ask)
    monkeypatch.setattr("glm3cli.evals.needle.open_here", lambda _config: FakeModel(engine))
    config = _config(tmp_path, lengths=None, depths="0,100", needles=3)
    result = run_needle(config)
    assert result is not None
    assert json.loads(config.output.read_text()) == result
    assert result["lengths"] == {"256": 0.5, "512": 0.5, "700": 0.5}
    assert result["micro"] == 0.5
    assert [(cell["depth"], cell["found"], cell["total"]) for cell in result["cells"]] == [
        (0, 0, 3),
        (100, 3, 3),
    ] * 3
    assert {cell["logprob"] for cell in result["cells"]} == {-1.0}
    page = read_page(tmp_path / "needle.html")
    assert "needles in haystacks" in page.text
