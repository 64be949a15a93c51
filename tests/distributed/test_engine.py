"""The inference engine at all parallel sizes: batches, the KV cache, sampling, and scores.

The tolerance of log-probabilities in fp32 is 1e-5, some tens of roundings of numbers around 5. An
error of a position, a rotation or a group changes them by more than 0.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from glm3cli.checkpoint.random import RandomSource
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.infer.sampling import Sampling
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    padded_vocab_size=128,
    seq_length=64,
    torch_dtype="fp32",
)
PARALLEL_SIZES: dict[str, tuple[int, dict[str, int]]] = {
    "1x1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "dp2": (2, {}),
}
SHAPES = {
    "plain": {},
    "rope_ratio 50": {"rope_ratio": 50.0},
    "linear scaling": {"rope_factor": 3.0},
    "one group": {"num_query_groups": 1},
    "a group per head": {"num_query_groups": 4},
}
PROMPTS = ([7, 3, 99], [5], [64, 65, 66, 67, 68, 69, 70, 1, 2], [11, 12, 13, 14])
CONTINUATIONS = ([4, 8], [100], [1, 2, 3, 4, 5], [90, 9, 99])
CANDIDATES = (3, 0, 127, 64)
LENGTH = 8
HOT = Sampling(greedy=False, temperature=1.5, top_k=40, top_p=0.95)


def random_source(model: ModelConfig) -> Any:
    """Returns random weights with which every part of the model has an effect.

    They are large enough that a token depends on those before it; biases and norms vary.
    """

    class Source(RandomSource):
        def read(self, weight: Any, layer: int | None = None) -> torch.Tensor:
            tensor = super().read(weight, layer)
            if tensor.dim() > 1:
                return tensor
            generator = torch.Generator().manual_seed(len(tensor) + 31 * (layer or 0))
            return tensor + torch.empty_like(tensor).normal_(0, 0.3, generator=generator)

    return Source(model, seed=3, std=0.15)


@dataclass(frozen=True)
class Found:
    """What one rank computes; an answer is the continuation of a prompt.

    Attributes:
        dp_rank: The rank's index in its data parallel group.
        logits: The logits at every position of the prompts and of their greedy answers,
            [b, longest, vocab] with the pads in front; None before the last stage.
        greedy: The tokens of the greedy answers, and their log-probabilities.
        alone: The same, with each prompt in a batch of its own.
        sampled: The tokens of two sampled answers to each prompt, with seeds 5 and 6.
        second_half: The tokens of the answers to the last two prompts with seed 7, as the second
            of two data parallel ranks samples them.
        next_logprobs: The log-probabilities of the candidates after each prompt.
        continuations: The scores of the continuations, and then of the first two greedy tokens.
    """

    dp_rank: int
    logits: torch.Tensor | None
    greedy: list[tuple[list[int], list[float]]]
    alone: list[tuple[list[int], list[float]]]
    sampled: list[list[list[int]]]
    second_half: list[list[int]]
    next_logprobs: list[list[float]]
    continuations: list[tuple[float, bool]]


def answer(options: dict[str, int], shape: dict[str, Any]) -> Found:
    """Computes all answers and scores with these parallel sizes; runs on a rank of the pool."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    model = MODEL.model_copy(update=shape)
    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(model), parallel, "fp32", grid)

        def generate(prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int = 0) -> Any:
            found = engine.generate(prompts, sampling, LENGTH, stop_ids=[], seed=seed)
            return [(one.token_ids, one.logprobs) for one in found]

        greedy = generate(PROMPTS, Sampling())
        rows = [[*prompt, *tokens] for prompt, (tokens, _) in zip(PROMPTS, greedy, strict=True)]
        best = [[*tokens[:2]] for tokens, _ in greedy]
        return Found(
            dp_rank=grid.dp_rank,
            logits=engine.all_logits(rows),
            greedy=greedy,
            alone=[one for prompt in PROMPTS for one in generate([prompt], Sampling())],
            sampled=[[t for t, _ in generate(PROMPTS, HOT, seed)] for seed in (5, 6)],
            second_half=[tokens for tokens, _ in generate(PROMPTS[2:], HOT, 5 + 2)],
            next_logprobs=engine.next_logprobs(PROMPTS, CANDIDATES),
            continuations=[
                *engine.continuation_logprobs(PROMPTS, CONTINUATIONS),
                *engine.continuation_logprobs(PROMPTS, best),
            ],
        )


@pytest.fixture(scope="module")
def found(ranks: RankPool) -> dict[str, list[Found]]:
    """Returns what every rank computes, by the name of the parallel sizes."""
    return {
        name: ranks.run(world_size, answer, options, {})
        for name, (world_size, options) in PARALLEL_SIZES.items()
    }


@pytest.fixture(scope="module")
def one(found: dict[str, list[Found]]) -> Found:
    return found["1x1"][0]


def logprobs_after(found: Found, row: int) -> torch.Tensor:
    """Returns the log-probabilities after a row's prompt and after each token of its answer."""
    assert found.logits is not None
    return found.logits[row, -LENGTH - 1 :].float().log_softmax(dim=-1)


@pytest.mark.parametrize("sizes", PARALLEL_SIZES)
def test_a_batch_is_its_prompts_alone(found: dict[str, list[Found]], sizes: str) -> None:
    for rank in found[sizes]:
        for (tokens, logprobs), alone in zip(rank.greedy, rank.alone, strict=True):
            assert tokens == alone[0]
            assert logprobs == pytest.approx(alone[1], abs=1e-5)


@pytest.mark.parametrize("sizes", PARALLEL_SIZES)
def test_all_parallel_sizes_answer_alike(
    found: dict[str, list[Found]], one: Found, sizes: str
) -> None:
    last = [rank for rank in found[sizes] if rank.logits is not None]
    assert last
    for rank in last:
        assert torch.allclose(rank.logits, one.logits, rtol=0, atol=1e-4)
    for rank in found[sizes]:
        for (tokens, logprobs), (expected, their) in zip(rank.greedy, one.greedy, strict=True):
            assert tokens == expected
            assert logprobs == pytest.approx(their, abs=1e-5)


def test_the_cache_changes_nothing(one: Found) -> None:
    """The tokens of cached steps are those of one forward pass over prompt and answer."""
    for row, (tokens, logprobs) in enumerate(one.greedy):
        full = logprobs_after(one, row)
        assert tokens == full[:-1].argmax(dim=-1).tolist()
        assert logprobs == pytest.approx(full[:-1].max(dim=-1).values.tolist(), abs=1e-5)
    # Answers that don't depend on their prompts would hide a wrong cache.
    assert len({tuple(tokens) for tokens, _ in one.greedy}) == len(PROMPTS)


@pytest.mark.parametrize("sizes", PARALLEL_SIZES)
def test_a_seed_gives_the_same_tokens_at_all_parallel_sizes(
    found: dict[str, list[Found]], one: Found, sizes: str
) -> None:
    for rank in found[sizes]:
        assert rank.sampled == one.sampled
        # A rank that has only the last rows draws what they get in the whole list.
        assert rank.second_half == one.sampled[0][2:]
    assert one.sampled[0] != one.sampled[1]


@pytest.mark.parametrize("sizes", PARALLEL_SIZES)
def test_scores_are_log_softmax_of_the_logits(
    found: dict[str, list[Found]], one: Found, sizes: str
) -> None:
    for rank in found[sizes]:
        for row, scores in enumerate(rank.next_logprobs):
            expected = logprobs_after(one, row)[0][list(CANDIDATES)]
            assert scores == pytest.approx(expected.tolist(), abs=1e-5)
        for row, ((tokens, logprobs), (score, is_greedy)) in enumerate(
            zip(one.greedy, rank.continuations[len(PROMPTS) :], strict=True)
        ):
            assert score == pytest.approx(sum(logprobs[:2]), abs=2e-5), (row, tokens)
            assert is_greedy
        for mine, theirs in zip(rank.continuations, one.continuations, strict=True):
            assert mine[0] == pytest.approx(theirs[0], abs=5e-5)
            assert mine[1] == theirs[1]


def glm_logits(shape: dict[str, Any], rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Returns the logits of each row by transformers, [length, vocab] each."""
    from tests.support import reference

    model = MODEL.model_copy(update=shape)
    glm = reference.build(model, random_source(model))
    with torch.no_grad():
        return [glm(torch.tensor([list(row)])).logits[0] for row in rows]


def test_continuations_are_transformers(one: Found) -> None:
    rows = [[*a, *b] for a, b in zip(PROMPTS, CONTINUATIONS, strict=True)]
    for row, logits in enumerate(glm_logits({}, rows)):
        target = torch.tensor(CONTINUATIONS[row])
        logprobs = logits[-len(target) - 1 : -1].log_softmax(dim=-1)
        score, is_greedy = one.continuations[row]
        expected = float(logprobs.gather(1, target.unsqueeze(1)).sum())
        assert score == pytest.approx(expected, abs=1e-4)
        assert is_greedy == bool((logprobs.argmax(dim=-1) == target).all())


@pytest.mark.parametrize("sizes", ["1x1", "tp2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_the_family_are_transformers(
    ranks: RankPool, found: dict[str, list[Found]], shape: str, sizes: str
) -> None:
    world_size, options = PARALLEL_SIZES[sizes]
    answers = (
        found[sizes] if shape == "plain" else ranks.run(world_size, answer, options, SHAPES[shape])
    )
    for rank in answers:
        assert rank.logits is not None
        rows = [
            [*prompt, *tokens] for prompt, (tokens, _) in zip(PROMPTS, rank.greedy, strict=True)
        ]
        for ours, theirs in zip(rank.logits, glm_logits(SHAPES[shape], rows), strict=True):
            assert torch.allclose(ours[-len(theirs) :], theirs, rtol=0, atol=1e-4)


def test_shapes_differ() -> None:
    """If shapes had no effect on the logits, the test of shapes would show nothing."""
    rows = [[*PROMPTS[2], *CONTINUATIONS[2]]]
    plain, *others = (glm_logits(shape, rows)[0] for shape in SHAPES.values())
    for other in others:
        assert (plain - other).abs().max() > 0.1


def drawn(options: dict[str, int]) -> list[tuple[list[float], list[float]]] | None:
    """Returns the log-probabilities of drawn tokens, and those by the logits; runs on the pool."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "fp32", grid)
        answers = engine.generate(PROMPTS, HOT, LENGTH, stop_ids=[], seed=5)
        rows = [[*p, *one.token_ids] for p, one in zip(PROMPTS, answers, strict=True)]
        logits = engine.all_logits(rows)
        if logits is None:
            return None
        plain = logits[:, -LENGTH - 1 : -1].log_softmax(dim=-1)  # before the rule changes them
        tokens = torch.tensor([one.token_ids for one in answers]).unsqueeze(2)
        expected = plain.gather(2, tokens).squeeze(2).tolist()
        return [(one.logprobs, theirs) for one, theirs in zip(answers, expected, strict=True)]


@pytest.mark.parametrize("sizes", ["1x1", "tp2 pp2"])
def test_drawn_tokens_have_their_log_probabilities(ranks: RankPool, sizes: str) -> None:
    world_size, options = PARALLEL_SIZES[sizes]
    found = [rank for rank in ranks.run(world_size, drawn, options) if rank]
    assert found
    for rank in found:
        for ours, theirs in rank:
            assert ours == pytest.approx(theirs, abs=1e-5)


def in_16_bits(dtype: Any, options: dict[str, int]) -> list[torch.Tensor] | None:
    """Returns the logits of each prompt in a 16-bit type, without the pads; runs on the pool."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, dtype, grid)
        logits = engine.all_logits(PROMPTS)
        assert not engine.scoring._pipeline._sent  # a stage that ended early would cut it off
        if logits is None:
            return None
        assert logits.dtype == torch.float32
        return [row[-len(prompt) :] for row, prompt in zip(logits, PROMPTS, strict=True)]


@pytest.mark.parametrize("sizes", ["1x1", "tp2 pp2"])
@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 8), ("fp16", 11)])
def test_16_bits_are_close_to_fp32(ranks: RankPool, dtype: str, bits: int, sizes: str) -> None:
    """Weights and activations are rounded to `bits` bits, each by half of 2**-bits at most.

    Four layers of some ten roundings each, of random sign, add up to about sqrt(40) / 2 of them;
    relative to the logits' norm, four times as much is still far from any mistake (1 and more).
    """
    world_size, options = PARALLEL_SIZES[sizes]
    answers = [rank for rank in ranks.run(world_size, in_16_bits, dtype, options) if rank]
    assert answers
    for rank in answers:
        for ours, exact in zip(rank, glm_logits({}, PROMPTS), strict=True):
            error = (ours - exact).norm() / exact.norm()
            assert 0 < error < 4 * 40**0.5 / 2 * 2.0**-bits


def run_requests() -> dict[str, Any]:
    """Adds, steps and ends requests one by one, and generates the same in one call."""
    from glm3cli.config.parallel import ParallelConfig
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.requests import Request
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig()
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "fp32", grid)
        whole = [one.token_ids for one in engine.generate(PROMPTS, Sampling(), LENGTH, [])]
        assert engine.is_idle
        lengths = [LENGTH, 2, *[LENGTH] * (len(PROMPTS) - 2)]
        requests = [Request(p, Sampling(), n) for p, n in zip(PROMPTS, lengths, strict=True)]
        numbers = [engine.add(request) for request in requests]
        first = engine.step()
        engine.end(numbers[0])  # which would go on otherwise
        late = engine.add(requests[2])
        while not engine.is_idle:
            engine.step()
        assert engine.step() == {}
        assert first[numbers[2]] == [engine.results[numbers[2]].token_ids[0]]
        return {
            "whole": whole,
            "first": [first[number] for number in numbers],
            "results": [engine.results[number] for number in numbers],
            "late": engine.results[late],
        }


def contexts_of_reuse() -> list[list[int]]:
    """Texts that begin alike."""
    shots, question = list(range(20, 44)), list(range(44, 62))
    return [
        *([*shots, *question[:-1], last] for last in (1, 2, 3)),  # the same question, changed
        *([*shots, last, 5] for last in (7, 8)),  # other questions
        [*shots, *question],
        [9, *shots],  # begins otherwise
        [*shots, *question],
    ]


def score_with_reuse(options: dict[str, int]) -> tuple[list[int], list[Any], list[Any]]:
    """Scores texts that begin alike, together and alone; returns the tokens read, and both."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    contexts = contexts_of_reuse()
    endings = [[1, 2], [3], [4], [5, 6, 7], [8], [9, 9], [10], [11]]
    read: list[int] = []
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "fp32", grid)
        pipeline = engine.scoring._pipeline
        forward = pipeline.forward

        def counted(runs: Any, *more: Any) -> Any:
            read.append(sum(len(run.tokens) for run in runs))
            return forward(runs, *more)

        pipeline.forward = counted
        together = engine.continuation_logprobs(contexts, endings)
        read.append(0)
        waits = [engine.ask_next(contexts[start : start + 3], CANDIDATES) for start in (0, 3, 6)]
        next_ones = [one for wait in waits for one in wait()]
        read.append(0)
        alone: list[Any] = []
        alone_next: list[Any] = []
        for context, ending in zip(contexts, endings, strict=True):
            engine.scoring.forget()
            alone += engine.continuation_logprobs([context], [ending])
            engine.scoring.forget()
            alone_next += engine.ask_next([context], CANDIDATES)()
    return read, [together, next_ones], [alone, alone_next]


@pytest.mark.parametrize("sizes", ["1x1", "tp2 pp2"])
def test_what_texts_begin_with_is_read_once_and_changes_nothing(
    sizes: str, ranks: RankPool
) -> None:
    world_size, options = PARALLEL_SIZES[sizes]
    for read, (together, next_ones), (alone, alone_next) in ranks.run(
        world_size, score_with_reuse, options
    ):
        for (ours, is_greedy), (theirs, was_greedy) in zip(together, alone, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
            assert is_greedy == was_greedy
        for found, expected in zip(next_ones, alone_next, strict=True):
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
            assert found.likeliest == expected.likeliest
        first = read.index(0)
        second = read.index(0, first + 1)
        # The shots once; the question once, with its four ends, of which one is read twice; the
        # others; what begins otherwise; and all but the last token of each ending.
        assert sum(read[:first]) == 24 + (17 + 4 + 1) + 2 * 2 + 25 + (1 + 2 + 1)
        # The next calls read the last token of each text: its logits are wanted.
        assert sum(read[first:second]) == len(contexts_of_reuse())


def ask_nan(options: dict[str, int]) -> list[str]:
    """Returns what this rank hears from a model with one weight that is NaN."""
    from glm3cli.errors import CheckpointError
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    class Source(RandomSource):
        def read(self, weight: Any, layer: int | None = None) -> torch.Tensor:
            tensor = super().read(weight, layer)
            if layer == 0 and tensor.dim() > 1:
                tensor[0, 0] = torch.nan
            return tensor

    parallel, heard = ParallelConfig(**options), []
    with open_grid(parallel) as grid:
        engine = Engine(Source(MODEL, seed=3, std=0.15), parallel, "fp32", grid)
        calls = [
            lambda: engine.generate(PROMPTS, Sampling(), LENGTH, []),
            lambda: engine.generate(PROMPTS, HOT, LENGTH, []),
            lambda: engine.continuation_logprobs(PROMPTS, CONTINUATIONS),
            lambda: engine.token_logprobs(PROMPTS, 2),
        ]
        for ask in calls:
            try:
                ask()
            except CheckpointError as error:
                heard.append(error.message)
        assert engine.is_idle
    return heard


@pytest.mark.parametrize("sizes", ["1x1", "pp2"])
def test_logits_that_are_nan_are_a_sentence_on_all_ranks(ranks: RankPool, sizes: str) -> None:
    world_size, options = PARALLEL_SIZES[sizes]
    for heard in ranks.run(world_size, ask_nan, options):
        assert heard == ["the model's logits are NaN"] * 4


def pass_the_last_position() -> list[str]:
    """Returns the warnings of requests of 60 to 66 tokens, for a model with 64 positions."""
    import logging

    from glm3cli.infer import pipeline as module
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    parallel = ParallelConfig()
    logging.getLogger(module.__name__).addHandler(handler)
    try:
        with open_grid(parallel) as grid:
            engine = Engine(random_source(MODEL), parallel, "fp32", grid)
            # The last token isn't read again: 64 positions take 65 tokens.
            for length in (5, 6, 7):
                engine.generate([[5] * 60], Sampling(), length, [])
                said.append(str(length))
            return said
    finally:
        logging.getLogger(module.__name__).removeHandler(handler)


def test_passing_the_models_positions_is_said_once(ranks: RankPool) -> None:
    [said] = ranks.run(1, pass_the_last_position)
    assert (said[0], said[2:]) == ("5", ["6", "7"])
    assert said[1].startswith("warning: a sequence gets longer than the 64 positions ")


@pytest.mark.dist
def test_requests_end_by_themselves_or_from_outside(ranks: RankPool) -> None:
    [found] = ranks.run(1, run_requests)
    whole, results = found["whole"], found["results"]
    assert found["first"] == [tokens[:1] for tokens in whole]
    assert results[0].token_ids == whole[0][:1]
    assert results[0].finish_reason == "stop"
    assert results[1].token_ids == whole[1][:2]
    assert results[1].finish_reason == "length"
    assert [one.token_ids for one in results[2:]] == whole[2:]
    # What is added while others run joins them.
    assert found["late"].token_ids == whole[2]
