"""What lm-evaluation-harness asks, answered without it: cutting, batching, stopping."""

from types import SimpleNamespace
from typing import Any

import pytest

from glm3cli.evals.scorer import Scorer, sampling_of, windows
from glm3cli.infer.sampling import Sampling
from tests.support.exam import FakeEngine, exam_tokenizer, score

TOKENIZER = exam_tokenizer()
PREFIX = list(TOKENIZER.prefix)


def _requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=arg) for arg in args]


def _total(context: list[int], continuation: list[int]) -> float:
    seen, total = list(context), 0.0
    for token in continuation:
        total += score(seen, token)
        seen.append(token)
    return total


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_loglikelihood_of_continuations(batch_size: int) -> None:
    pairs = [("What is it? Answer:", " A"), ("one two", " three four"), ("one", " two"), ("", "A")]
    scorer = Scorer(FakeEngine(TOKENIZER), TOKENIZER, batch_size)
    found = scorer.loglikelihood(_requests(*pairs))
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = TOKENIZER.encode(context)
        rest = TOKENIZER.encode(context + continuation)[len(ids) :]
        assert total == _total(PREFIX + ids, rest)
        assert isinstance(greedy, bool)


def test_spaces_at_the_border_belong_to_the_continuation() -> None:
    scorer = Scorer(FakeEngine(TOKENIZER), TOKENIZER, 1)
    (before,), (after,) = (
        scorer.loglikelihood(_requests(pair)) for pair in [("one ", "two"), ("one", " two")]
    )
    assert before == after


def test_long_contexts_lose_their_beginning() -> None:
    engine = FakeEngine(TOKENIZER, seq_length=12)
    Scorer(engine, TOKENIZER, 1).loglikelihood(_requests(("one two three four five " * 5, "one")))
    (((context),),) = [tuple(batch) for batch in engine.batches]
    whole = TOKENIZER.encode("one two three four five " * 5 + "one")
    assert list(context[:2]) == PREFIX
    rest = len(whole) - len(TOKENIZER.encode(("one two three four five " * 5).rstrip()))
    assert list(context[2:]) == whole[-10:-rest]


def test_nothing_follows_for_certain() -> None:
    scorer = Scorer(FakeEngine(TOKENIZER), TOKENIZER, 1)
    assert scorer.loglikelihood(_requests(("", ""))) == [(0.0, True)]


@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, 7, 20])
def test_windows_score_each_token_once_with_context(length: int) -> None:
    tokens = list(range(100, 100 + length))
    found = list(windows(tokens, 5))
    assert [token for _, scored in found for token in scored] == tokens
    for i, (context, scored) in enumerate(found):
        assert len(context) + len(scored) <= 5
        assert bool(context) == (i > 0)
        start = tokens.index(scored[0])
        assert tokens[start - len(context) : start] == context
    if length >= 5:
        assert len(found[-1][0]) + len(found[-1][1]) == 5


def test_rolling_loglikelihood_adds_the_windows() -> None:
    text = "one two three four five " * 4
    ids = TOKENIZER.encode(text)
    engine = FakeEngine(TOKENIZER, seq_length=10)
    found = Scorer(engine, TOKENIZER, 4).loglikelihood_rolling(_requests(("one",), (text,)))
    expected = sum(_total(PREFIX + context, scored) for context, scored in windows(ids, 8))
    assert found == [_total(PREFIX, TOKENIZER.encode("one")), pytest.approx(expected)]
    assert all(len(batch) == 1 for batch in engine.batches)


def test_generates_up_to_the_first_stop_string() -> None:
    engine = FakeEngine(TOKENIZER)
    engine.script = TOKENIZER.encode("one two\nthree four five")
    scorer = Scorer(engine, TOKENIZER, 2)
    requests = _requests(
        ("a", {"until": ["\n", "four"], "max_gen_toks": 50}),
        ("b c", {"until": "four", "max_gen_toks": 50}),
        ("d", {"until": [], "max_gen_toks": 50}),
        ("e", {"until": ["\n", "four"], "max_gen_toks": 50}),
        ("f", {"until": ["zzz"], "max_gen_toks": 1}),
    )
    first = TOKENIZER.decode(engine.script[:1])
    assert scorer.generate_until(requests) == [
        "one two",
        "one two\nthree ",
        "one two\nthree four five",
        "one two",
        first,
    ]
    assert sorted(len(batch) for batch in engine.batches) == [1, 1, 1, 2]


def test_generation_stops_at_the_end_token() -> None:
    engine = FakeEngine(TOKENIZER)
    engine.script = [*TOKENIZER.encode("one"), TOKENIZER.eos_id, *TOKENIZER.encode("two")]
    scorer = Scorer(engine, TOKENIZER, 1)
    assert scorer.generate_until(_requests(("a", {"until": ["zzz"]}))) == ["one"]


def test_prompts_leave_room_for_the_answer() -> None:
    engine = FakeEngine(TOKENIZER, seq_length=20)
    text = "one two three four five " * 5
    Scorer(engine, TOKENIZER, 1).generate_until(_requests((text, {"max_gen_toks": 8})))
    assert engine.batches == [[(*PREFIX, *TOKENIZER.encode(text)[-10:])]]


def test_sampling_options_of_tasks() -> None:
    assert sampling_of({}).greedy
    assert sampling_of({"do_sample": False, "temperature": 0.7}).greedy
    assert sampling_of({"do_sample": True, "temperature": 0.0}).greedy
    options = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4}
    assert sampling_of(options) == Sampling(greedy=False, temperature=0.5, top_k=4, top_p=0.9)
    assert sampling_of({"temperature": 0.5}) == Sampling(greedy=False, temperature=0.5)
