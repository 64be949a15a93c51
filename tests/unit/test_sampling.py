"""Sampling from logits, against the same rules written down again in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glm3cli.infer.decoding.penalties import penalize
from glm3cli.infer.sampling import Sampling, filtered_probabilities, sample


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def probabilities(logits: list[float], **options: float) -> list[float]:
    sampling = Sampling(greedy=False, **options)
    return filtered_probabilities(torch.tensor([logits]), sampling)[0].tolist()


def logs(*shares: float) -> list[float]:
    """Returns logits whose softmax is `shares`."""
    return [math.log(share) for share in shares]


def rederived(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Applies the rules token by token, from the likeliest on, to a row without ties."""
    scaled = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda token: -scaled[token])
    kept = order[: top_k or len(order)]
    total = sum(scaled[token] for token in kept)
    chosen, mass = [], 0.0
    for token in kept:
        if mass >= top_p and top_p < 1:
            break
        chosen.append(token)
        mass += scaled[token] / total
    result = np.zeros(len(logits))
    result[chosen] = scaled[chosen] / scaled[chosen].sum()
    return result


def test_greedy_takes_the_likeliest_token_of_every_row():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.9]])
    assert sample(logits, [Sampling(greedy=True, top_k=1)] * 2, []).tolist() == [1, 0]


def test_temperature_one_without_limits_is_the_softmax():
    assert probabilities(logs(0.5, 0.3, 0.2)) == pytest.approx([0.5, 0.3, 0.2])


def test_temperature_below_one_sharpens_and_above_flattens():
    assert probabilities(logs(0.8, 0.2), temperature=0.5) == pytest.approx([16 / 17, 1 / 17])
    assert probabilities(logs(0.8, 0.2), temperature=2.0) == pytest.approx([2 / 3, 1 / 3])


def test_top_k_keeps_the_k_likeliest():
    logits = logs(0.1, 0.4, 0.2, 0.3)
    assert probabilities(logits, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert probabilities(logits, top_k=1) == pytest.approx([0, 1, 0, 0])
    assert probabilities(logits, top_k=0) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert probabilities(logits, top_k=99) == pytest.approx([0.1, 0.4, 0.2, 0.3])


def test_top_p_keeps_the_likeliest_that_reach_this_mass():
    logits = logs(0.1, 0.5, 0.25, 0.15)
    assert probabilities(logits, top_p=0.7) == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert probabilities(logits, top_p=0.8) == pytest.approx([0, 5 / 9, 2.5 / 9, 1.5 / 9])


def test_top_p_always_keeps_the_first_token():
    assert probabilities(logs(0.6, 0.4), top_p=1e-9) == pytest.approx([1, 0])


def test_top_p_counts_the_mass_that_temperature_and_top_k_leave():
    # Of the two that top-k leaves, the first has 4/7 > 0.5; of all it has 0.4.
    assert probabilities(logs(0.1, 0.4, 0.2, 0.3), top_k=2, top_p=0.5) == pytest.approx(
        [0, 1, 0, 0]
    )
    # Sharpened to 16/17, the first is enough.
    assert probabilities(logs(0.8, 0.2), temperature=0.5, top_p=0.9) == pytest.approx([1, 0])


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(1, 40),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 0.99) | st.just(1.0),
)
def test_the_rules_agree_with_a_plain_rederivation(seed, vocab, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).permutation(vocab) * 0.25
    sampling = Sampling(False, temperature, top_k, top_p)
    found = filtered_probabilities(torch.tensor(np.array([logits])), sampling)
    expected = rederived(logits, temperature, top_k, top_p)
    # Where a sum meets the limit, rounding decides on the last token.
    edges = [rederived(logits, temperature, top_k, top_p + shift) for shift in (1e-5, -1e-5)]
    assume(top_p == 1 or np.array_equal(*edges))
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)


def test_the_rules_are_transformers():
    """Each alone and all in a row; the likeliest tokens of flat and of steep rows."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 300, generator=generator) * torch.tensor([[0.3], [3.0]] * 4)
    warpers = {
        "temperature": (1.7, theirs.TemperatureLogitsWarper(1.7)),
        "top_k": (20, theirs.TopKLogitsWarper(20)),
        "top_p": (0.8, theirs.TopPLogitsWarper(0.8)),
        "min_p": (0.1, theirs.MinPLogitsWarper(0.1)),
    }
    for names in [*([name] for name in warpers), list(warpers)]:
        sampling = Sampling(greedy=False, **{name: warpers[name][0] for name in names})
        chain = LogitsProcessorList([warpers[name][1] for name in names])
        expected = chain(torch.zeros(8, 1, dtype=torch.long), logits).softmax(dim=-1)
        found = filtered_probabilities(logits, sampling)
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_few_tokens_of_a_large_vocabulary_are_those_of_all():
    """Steep rows, flat ones, of which all tokens must be sorted, and both together."""
    generator = torch.Generator().manual_seed(3)
    steep, flat = (scale * torch.randn(4, 5000, generator=generator) for scale in (4.0, 0.1))
    for logits in (steep, flat, torch.cat((steep, flat))):
        for rule in (Sampling(greedy=False, top_p=0.8), Sampling(greedy=False, min_p=0.05)):
            found = filtered_probabilities(logits, rule)
            shares = logits.softmax(dim=-1)
            ordered, ids = shares.sort(dim=-1, descending=True)
            stays = ordered.cumsum(dim=-1) - ordered < rule.top_p
            stays &= ordered >= rule.min_p * ordered[:, :1]
            kept = torch.zeros_like(shares).scatter_(1, ids, ordered * stays)
            torch.testing.assert_close(found, kept / kept.sum(dim=-1, keepdim=True))


def test_tokens_as_likely_as_the_last_of_top_k_stay():
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 0.0]])
    found = filtered_probabilities(logits, Sampling(greedy=False, top_k=3))
    assert (found > 0).tolist() == [[True, True, True, True, True, False]]


def test_draws_pass_a_chi_square_test():
    """The 99.9th percentile of chi-square with n - 1 degrees, by Wilson and Hilferty.

    The token ids lie in blocks of the draw, of which the last one isn't full.
    """
    generator = torch.Generator().manual_seed(5)
    row, count = torch.full((1000,), -torch.inf), 20_000
    row[torch.randperm(1000, generator=generator)[:60]] = torch.randn(60, generator=generator) * 1.5
    for sampling in (
        Sampling(greedy=False, temperature=1.3),
        Sampling(greedy=False, temperature=0.8, top_k=25, top_p=0.95, min_p=0.01),
    ):
        shares = filtered_probabilities(row[None], sampling)[0].double()
        drawn = sample(row.repeat(count, 1), [sampling] * count, generators(*range(count)))
        seen = torch.bincount(drawn, minlength=1000).double()
        assert not seen[shares == 0].any()
        expected = shares[shares > 0] * count
        statistic = float(((seen[shares > 0] - expected) ** 2 / expected).sum())
        degrees = len(expected) - 1
        limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
        assert statistic < limit


def test_penalties_are_transformers_and_openais():
    from transformers.generation import logits_process as theirs

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3
    prompt, new = [3, 7, 9, 3, 7], [11, 3, 7, 11]
    whole = torch.tensor([[*prompt, *new]])
    cases = [
        (Sampling(repetition_penalty=1.4), theirs.RepetitionPenaltyLogitsProcessor(1.4)),
        (Sampling(no_repeat_ngram_size=2), theirs.NoRepeatNGramLogitsProcessor(2)),
        (Sampling(no_repeat_ngram_size=1), theirs.NoRepeatNGramLogitsProcessor(1)),
        (Sampling(no_repeat_ngram_size=40), theirs.NoRepeatNGramLogitsProcessor(40)),
        (
            Sampling(logit_bias=((3, 2.0), (8, -1.5))),
            theirs.SequenceBiasLogitsProcessor({(3,): 2.0, (8,): -1.5}),
        ),
    ]
    for rule, processor in cases:
        found = logits.clone()
        penalize(found, rule, prompt, new)
        assert torch.equal(found, processor(whole, logits[None].clone())[0])
    found = logits.clone()
    penalize(found, Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt, new)
    expected = logits.clone()
    for token, times in {11: 2, 3: 1, 7: 1}.items():
        expected[token] -= 0.5 + 0.25 * times
    torch.testing.assert_close(found, expected)


def test_half_precision_logits_are_filtered_in_fp32():
    found = filtered_probabilities(
        torch.zeros(1, 3000, dtype=torch.bfloat16), Sampling(greedy=False)
    )
    assert found.dtype == torch.float32
    assert float(found.sum()) == pytest.approx(1)


def test_draws_follow_the_probabilities_and_nothing_else():
    logits = torch.tensor([logs(0.6, 0.3, 0.0999, 0.0001)]).repeat(4000, 1)
    drawn = sample(logits, [Sampling(greedy=False, top_k=3)] * 4000, generators(*range(4000)))
    shares = np.bincount(drawn.numpy(), minlength=4) / 4000
    assert shares == pytest.approx([0.6006, 0.3003, 0.1, 0], abs=0.03)
    assert shares[3] == 0


def test_a_rows_draws_do_not_depend_on_the_other_rows():
    random = torch.Generator().manual_seed(0)
    steps = [torch.randn(3, 50, generator=random) for _ in range(20)]
    sampling = Sampling(greedy=False, temperature=2.0)
    together = generators(7, 8, 9)
    batched = [sample(logits, [sampling] * 3, together).tolist() for logits in steps]
    alone = generators(8)
    assert [sample(logits[1:2], [sampling], alone).item() for logits in steps] == [
        row[1] for row in batched
    ]
    assert len({row[1] for row in batched}) > 5  # it does draw


def test_another_rounding_of_the_logits_draws_the_same_tokens():
    """By sums of the probabilities in their order, 1 of 100 such draws would be another one."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2000, 1000, generator=generator) * 0.05
    other = logits + 1e-6 * torch.randn(logits.shape, generator=generator)
    for rule in (Sampling(greedy=False), Sampling(greedy=False, top_k=900, top_p=0.9)):
        drawn = [sample(one, [rule] * 2000, generators(*range(2000))) for one in (logits, other)]
        assert torch.equal(*drawn)


def test_a_generator_more_or_less_than_rows_is_a_bug():
    with pytest.raises(ValueError, match="zip"):
        sample(torch.zeros(2, 3), [Sampling(greedy=False)] * 2, generators(1))


def test_every_row_has_a_rule_of_its_own():
    logits = torch.tensor([[0.0, 3.0, 1.0]]).repeat(3, 1)
    rules = [Sampling(greedy=True), Sampling(greedy=False, top_k=1), Sampling(greedy=False)]
    drawn = [sample(logits, rules, generators(0, 1, seed)).tolist() for seed in range(40)]
    assert {row[0] for row in drawn} == {row[1] for row in drawn} == {1}
    assert {row[2] for row in drawn} == {0, 1, 2}
