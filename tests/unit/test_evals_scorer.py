"""What lm-evaluation-harness asks, answered without it: cutting, batching, stopping."""

from typing import Any

import pytest

from glm3cli.data.tokens.chat import begin_turn, build_prompt
from glm3cli.data.tokens.messages import Message
from glm3cli.errors import ConfigError
from glm3cli.evals.harness.options import decoding_of
from glm3cli.evals.harness.scorer import Scorer, windows
from glm3cli.evals.harness.template import as_text, token_ids
from glm3cli.infer.decoding.beams import Beams
from glm3cli.infer.decoding.rules import Decoding
from glm3cli.infer.sampling import Sampling
from tests.support.exam import FakeEngine, exam_tokenizer, score

TOKENIZER = exam_tokenizer()
PREFIX = list(TOKENIZER.prefix)


def _requests(*args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return list(args)


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
    assert [len(batch) for batch in engine.batches] == [5]  # side by side, whatever their options
    assert sorted(engine.seeds) == [0, 1, 2, 3, 4]


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


def test_generation_options_of_tasks() -> None:
    assert decoding_of({}) == Decoding(Sampling(), 256, logprobs=None)
    assert decoding_of({"do_sample": False, "temperature": 0.7, "top_p": 0.5}).sampling.greedy
    assert decoding_of({"do_sample": True, "temperature": 0.0}).sampling.greedy
    options = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "until": "x"}
    sampling = Sampling(greedy=False, temperature=0.5, top_k=4, top_p=0.9)
    assert decoding_of(options) == Decoding(sampling, 256, stops=("x",), logprobs=None)
    found = decoding_of({"num_beams": 3, "repetition_penalty": 1.5, "max_new_tokens": 9})
    assert (found.beams, found.max_new_tokens) == (Beams(3), 9)
    assert found.sampling == Sampling(repetition_penalty=1.5)
    with pytest.raises(ConfigError, match="generation option 'penalty_alpha'"):
        decoding_of({"penalty_alpha": 0.6})


def test_turns_of_a_chat_are_read_as_they_are_trained() -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in [("user", "one"), ("assistant", "two"), ("user", "three")]
    ]
    ids = token_ids(TOKENIZER, as_text(turns, begins_answer=True))
    messages = [Message.from_dict(turn) for turn in turns]
    assert [*PREFIX, *ids] == [*build_prompt(TOKENIZER, messages), *TOKENIZER.encode("\n")]
    ids = token_ids(TOKENIZER, as_text(turns[:2], begins_answer=False))
    assert [*PREFIX, *ids] == begin_turn(TOKENIZER, messages[:2])
