"""Beams, penalties, and ends against transformers' `generate`, with the same weights."""

from typing import Any

import pytest
import torch

from glm3cli.config.parallel import ParallelConfig
from glm3cli.infer.decoding.beams import Beams
from glm3cli.infer.requests import Request
from glm3cli.infer.sampling import Sampling
from tests.distributed.test_engine import MODEL, random_source
from tests.support import reference
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist

PROMPTS = ([7, 3, 99], [5], [64, 65, 66, 67, 68, 69, 70, 1, 2], [11, 12, 13, 14, 11, 12])
LENGTH = 10
# Tokens that the model says often enough to end some texts early.
ENDS = (95, 4, 116)

BEAMS = {
    "two": Beams(2),
    "four, short ones": Beams(4, length_penalty=-1.0, num_return=3),
    "four, long ones": Beams(4, length_penalty=2.0, num_return=2),
    "three, the first that end": Beams(3, early_stopping=True, num_return=3),
    "three, to the end": Beams(3, length_penalty=0.7, early_stopping="never"),
    "four, without a penalty": Beams(4, length_penalty=0.0, early_stopping="never", num_return=4),
}
RULES: dict[str, tuple[Sampling, dict[str, Any]]] = {
    "plain": (Sampling(), {}),
    "repetition": (Sampling(repetition_penalty=1.15), {"repetition_penalty": 1.15}),
    "n-grams": (Sampling(no_repeat_ngram_size=2), {"no_repeat_ngram_size": 2}),
    "single tokens": (Sampling(no_repeat_ngram_size=1), {"no_repeat_ngram_size": 1}),
    "bias": (
        Sampling(logit_bias=((3, 6.0), (90, -4.5))),
        {"sequence_bias": {(3,): 6.0, (90,): -4.5}},
    ),
    "all": (
        Sampling(repetition_penalty=0.8, no_repeat_ngram_size=3, logit_bias=((3, 4.0),)),
        {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "sequence_bias": {(3,): 4.0}},
    ),
}
ONE = (1, {})
SOME = {"1x1": ONE, "tp2 pp2": (4, {"tp": 2, "pp": 2})}


@pytest.fixture(scope="module")
def glm() -> Any:
    return reference.build(MODEL, random_source(MODEL)).eval()


def by_transformers(glm: Any, prompt: Any, **options: Any) -> tuple[list[list[int]], Any]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = glm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LENGTH,
            pad_token_id=127,
            return_dict_in_generate=True,
            output_scores=True,
            **{"do_sample": False, "eos_token_id": list(ENDS), **options},
        )
    texts = []
    for row in found.sequences[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in ENDS), len(row))
        texts.append(row[:end])
    return texts, found.get("sequences_scores")


def answered(options: dict[str, int], requests: list[Request]) -> list[Any]:
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "fp32", grid, max_batch_size=12)
        return engine.answer(requests)


@pytest.mark.parametrize("sizes", SOME)
def test_beams_are_transformers(ranks: RankPool, glm: Any, sizes: str) -> None:
    world_size, options = SOME[sizes]
    cases = [(prompt, beams) for beams in BEAMS.values() for prompt in PROMPTS]
    requests = [Request(p, Sampling(), LENGTH, ENDS, beams=beams) for p, beams in cases]
    theirs = [
        by_transformers(
            glm,
            prompt,
            num_beams=beams.num_beams,
            length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping,
            num_return_sequences=beams.num_return,
        )
        for prompt, beams in cases
    ]
    for found in ranks.run(world_size, answered, options, requests):
        for one, (texts, scores) in zip(found, theirs, strict=True):
            whole = [one, *one.others]
            assert [each.token_ids for each in whole] == texts
            assert [each.score for each in whole] == pytest.approx(
                scores.tolist(), rel=1e-6, abs=1e-5
            )
    reasons = {each.finish_reason for one in found for each in (one, *one.others)}
    assert reasons == {"stop", "length"}


def test_penalties_of_beams_are_transformers(ranks: RankPool, glm: Any) -> None:
    cases = [(prompt, rule) for rule in RULES.values() for prompt in PROMPTS]
    requests = [Request(p, rule, LENGTH, ENDS, beams=Beams(3)) for p, (rule, _) in cases]
    [found] = ranks.run(1, answered, {}, requests)
    for one, (prompt, (_, options)) in zip(found, cases, strict=True):
        [text], _ = by_transformers(glm, prompt, num_beams=3, **options)
        assert one.token_ids == text


@pytest.mark.parametrize("sizes", SOME)
def test_penalties_are_transformers(ranks: RankPool, glm: Any, sizes: str) -> None:
    world_size, options = SOME[sizes]
    cases = [(prompt, rule) for rule in RULES.values() for prompt in PROMPTS]
    requests = [Request(p, rule, LENGTH, ENDS) for p, (rule, _) in cases]
    theirs = [by_transformers(glm, p, **more)[0][0] for p, (_, more) in cases]
    for found in ranks.run(world_size, answered, options, requests):
        assert [one.token_ids for one in found] == theirs
    # Each rule changes something.
    rules = [tuple(map(tuple, theirs[i : i + len(PROMPTS)])) for i in range(0, len(cases), 4)]
    assert len(set(rules)) == len(RULES)


def test_a_guess_changes_nothing(ranks: RankPool) -> None:
    """Also with penalties, which see the guessed tokens, and where a text ends within a guess."""
    prompt = [11, 12, 13, 14] * 3
    rules = [Sampling(), Sampling(repetition_penalty=1.3), Sampling(logit_bias=((12, 9.0),))]
    requests = [Request(p, rule, 12, ENDS) for p in (*PROMPTS, prompt) for rule in rules]
    guessing = [
        Request(one.prompt, one.sampling, 12, ENDS, lookup=4, logprobs=0) for one in requests
    ]
    for world_size, options in SOME.values():
        for plain, guessed in zip(
            ranks.run(world_size, answered, options, requests),
            ranks.run(world_size, answered, options, guessing),
            strict=True,
        ):
            for ours, theirs in zip(guessed, plain, strict=True):
                assert ours.token_ids == theirs.token_ids
                assert ours.finish_reason == theirs.finish_reason
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
