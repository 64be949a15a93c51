"""How much each token weighs in the loss, and the noise on its embedding."""

import numpy as np
import pytest
import torch

from glm3cli.data.samples.weighting import Weighting
from glm3cli.model.noise import EmbeddingNoise, uniform

# Two samples: one with the answers (5, 6) and (7), the other with (8, 9, 9).
LABELS = np.array([-100, 5, 6, -100, 7, -100, -100, 8, 9, 9])
SEGMENTS = np.array([1, 1, 1, 1, 1, 1, 2, 2, 2, 2])


@pytest.mark.parametrize(
    ("weighting", "weights", "expected"),
    [
        (Weighting(), None, [0, 1, 1, 0, 1, 0, 0, 1, 1, 1]),
        (Weighting("sample"), None, [0, 1 / 3, 1 / 3, 0, 1 / 3, 0, 0, 1 / 3, 1 / 3, 1 / 3]),
        (Weighting(last_turn_only=True), None, [0, 0, 0, 0, 1, 0, 0, 1, 1, 1]),
        (Weighting("sample", last_turn_only=True), None, [0, 0, 0, 0, 1, 0, 0, *[1 / 3] * 3]),
        (Weighting(), [2, 0.5], [0, 2, 2, 0, 2, 0, 0, 0.5, 0.5, 0.5]),
        (Weighting("sample"), [3, 0], [0, 1, 1, 0, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_weights_of_tokens(weighting: Weighting, weights, expected) -> None:
    given = None if weights is None else np.array(weights)
    found = weighting.of(LABELS, SEGMENTS, given)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected)


def test_a_sample_without_a_trained_token_weighs_nothing() -> None:
    for weighting in (Weighting(), Weighting("sample", last_turn_only=True)):
        assert not weighting.of(np.full(4, -100), np.ones(4)).any()


def mixed(state: int) -> int:
    """SplitMix64 with whole numbers of Python."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_random_numbers_are_those_of_split_mix() -> None:
    places = torch.tensor([[0, 5], [2**40, 77]])
    found = uniform(places, 3, seed=9)
    for i in range(2):
        for j in range(2):
            for k in range(3):
                counter = int(places[i, j]) * 3 + k + 9 * 3
                bits = mixed(counter * 0x9E3779B97F4A7C15 % 2**64) >> 40
                assert float(found[i, j, k]) == bits / 2**23 - 1


def test_noise_is_uniform_in_its_scale_and_only_in_training() -> None:
    embedding = torch.nn.Identity()
    noise = EmbeddingNoise(seed=1)
    noise.attach(embedding)
    hidden = torch.zeros(200, 2, 64)
    assert torch.equal(embedding(hidden), hidden)  # no micro-batch has said its places
    noise.places = torch.arange(400).view(2, 200)
    noise.scales = torch.tensor([[0.5], [0.0]]).expand(2, 200)
    found = embedding(hidden)
    assert not found[:, 1].any()
    assert found[:, 0].abs().max() <= 0.5
    assert float(found[:, 0].mean()) == pytest.approx(0, abs=0.01)
    assert float(found[:, 0].std()) == pytest.approx(0.5 / 3**0.5, rel=0.02)
    # Neighbours in either direction have nothing to do with each other.
    for left, right in ((found[1:, 0], found[:-1, 0]), (found[:, 0, 1:], found[:, 0, :-1])):
        assert abs(float((left * right).mean())) < 0.002
    assert torch.equal(embedding(hidden), found)
    noise.seed = 2
    assert not torch.isclose(embedding(hidden)[:, 0], found[:, 0], atol=0).any(dim=-1).all()
    embedding.eval()
    assert torch.equal(embedding(hidden), hidden)
