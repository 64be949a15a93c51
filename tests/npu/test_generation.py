"""All that `glm3 generate` can do gives the CPU's tokens on the emulated NPU.

In fp32 both compute the same sums in another order: log-probabilities differ by some roundings of
numbers around 5. In bf16, of 8 binary digits, they differ by some hundredths: only greedy tokens
are compared, and where two are as likely as each other either may come.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from glm3cli.checkpoint.convert.random_model import write_random_model
from glm3cli.checkpoint.random import RandomSource
from glm3cli.config.parallel import ParallelConfig
from glm3cli.infer.decoding.beams import Beams
from glm3cli.infer.sampling import Sampling
from tests.distributed.test_engine import MODEL, PROMPTS, random_source
from tests.distributed.test_selected_adapters import together
from tests.distributed.test_server_tools import gathered
from tests.support.ranks import RankPool
from tests.support.server import Asking, complete, say, serve_for
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

pytestmark = pytest.mark.dist

# With as many entries as the tokenizer of the grammars has, and more.
WIDE = MODEL.model_copy(update={"padded_vocab_size": 512})
SIZES: dict[str, tuple[int, dict[str, int]]] = {
    "one rank": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "8 bits": {"dtype": "bf16", "bits": 8},
    "4 bits": {"dtype": "bf16", "bits": 4},
}
NEAR = 0.1  # roundings of logits around 5 in bf16
LENGTH, ENDS = 10, (95, 4, 116)
REPEATED = [11, 12, 13, 14] * 3
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
# What a model of any type is asked.
PLAIN: dict[str, dict[str, Any]] = {
    **{f"greedy {number}": {"prompt": one, "logprobs": 4} for number, one in enumerate(PROMPTS)},
    # The bias makes the model say again what it has said, so that guesses are right.
    "guesses": {"prompt": REPEATED, "lookup": 4, "sampling": Sampling(logit_bias=((12, 9.0),))},
}
# What one of fp32 is asked, too.
MORE: dict[str, dict[str, Any]] = {
    "penalties": {
        "prompt": REPEATED,
        "sampling": Sampling(
            repetition_penalty=1.3,
            presence_penalty=0.5,
            frequency_penalty=0.4,
            no_repeat_ngram_size=3,
            logit_bias=((12, 4.0), (3, -2.5)),
        ),
    },
    "a JSON schema": {"grammar": "schema", "max_new_tokens": 24},
    "beams": {"beams": Beams(3, length_penalty=0.7, num_return=3)},
    "beams with penalties": {
        "beams": Beams(2, early_stopping=True),
        "sampling": Sampling(repetition_penalty=1.2, no_repeat_ngram_size=2),
    },
    "all that is likely": {
        "sampling": Sampling(greedy=False, temperature=1.5, top_k=40, top_p=0.95)
    },
    "what isn't unlikely": {"sampling": Sampling(greedy=False, temperature=1.2, min_p=0.02)},
    "any token, with penalties": {
        "sampling": Sampling(greedy=False, presence_penalty=0.3),
        "seed": 5,
        "logprobs": 2,
    },
    "drawn beams": {
        "beams": Beams(3, num_return=2),
        "sampling": Sampling(greedy=False, temperature=1.3, top_k=30),
    },
    "a regular expression": {
        "grammar": "regex",
        "sampling": Sampling(greedy=False, temperature=1.5),
        "max_new_tokens": 24,
    },
}


def requests(folder: Path, names: dict[str, dict[str, Any]]) -> list[Any]:
    """Returns a request of each kind, with prompts in turn."""
    from glm3cli.data.tokens.tokenizer import Tokenizer
    from glm3cli.infer.decoding.grammar import Grammar, from_schema, read_grammar
    from glm3cli.infer.requests import Request

    tokenizer = Tokenizer.load(folder)
    texts = {"schema": from_schema(SCHEMA, "a"), "regex": read_grammar(None, "(yes|no){2,5}")}
    found = []
    for number, given in enumerate(names.values()):
        named = {
            "prompt": PROMPTS[number % len(PROMPTS)],
            "sampling": Sampling(),
            "max_new_tokens": LENGTH,
            "stop_ids": ENDS,
            **given,
        }
        if "grammar" in given:
            ends = tuple(tokenizer.ends)
            named |= {"stop_ids": ends}
            named |= {"grammar": Grammar(str(texts[given["grammar"]]), tokenizer, ends)}
        found.append(Request(**named))
    return found


def generated(options: dict[str, int], folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Returns the continuations of each kind of model, of all requests side by side."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    found: dict[str, dict[str, list[Any]]] = {}
    with open_grid(parallel) as grid:
        for kind, given in KINDS.items():
            engine = Engine(random_source(WIDE), parallel, grid=grid, **given)
            asked = PLAIN | (MORE if kind == "fp32" else {})
            answers = engine.answer(requests(folder, asked))
            found[kind] = {
                name: [answer, *answer.others] for name, answer in zip(asked, answers, strict=True)
            }
            if kind == "fp32":
                assert engine.batching.num_accepted > 0
    return found


def assert_alike(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Compares the continuations of one request in fp32."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.score == pytest.approx(other.score, abs=1e-5)
        tokens = [[token for token, _ in top] for top in one.top_logprobs]
        assert tokens == [[token for token, _ in top] for top in other.top_logprobs]


def assert_near(one: Any, other: Any) -> None:
    """Compares a greedy continuation in 16 bits with the CPU's.

    Where their tokens part, the CPU's two likeliest ones must be as likely as each other.
    """
    same = 0
    for ours, theirs in zip(one.token_ids, other.token_ids, strict=False):
        if ours != theirs:
            top = dict(other.top_logprobs[same])
            assert top[ours] == pytest.approx(top[theirs], abs=NEAR)
            break
        same += 1
    assert one.logprobs[:same] == pytest.approx(other.logprobs[:same], abs=NEAR)


@pytest.mark.parametrize(
    "sizes",
    ["one rank", *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ("tp2", "pp2"))],
)
def test_every_way_of_decoding_gives_the_cpus_tokens(
    ranks: RankPool, npu_ranks: RankPool, sizes: str
) -> None:
    world_size, options = SIZES[sizes]
    folder = tiny_tokenizer_folder()
    [expected, *_] = ranks.run(world_size, generated, options, folder)
    for found in npu_ranks.run(world_size, generated, options, folder):
        for name, theirs in expected["fp32"].items():
            assert_alike(found["fp32"][name], theirs)
        for kind, answers in expected.items():
            for name, [theirs] in (answers if kind != "fp32" else {}).items():
                assert_near(found[kind][name][0], theirs)
    texts = {tuple(one.token_ids) for [one, *_] in expected["fp32"].values()}
    assert len(texts) == len(PLAIN) + len(MORE)  # each rule changes something


@pytest.mark.parametrize("sizes", SIZES)
def test_adapters_that_are_not_merged_give_the_cpus_tokens(
    ranks: RankPool, npu_ranks: RankPool, sizes: str
) -> None:
    """LoRA, DoRA and PiSSA, each chosen by some of the texts of a batch."""
    world_size, options = SIZES[sizes]
    [(expected, scores), *_] = ranks.run(world_size, together, options)
    for answers, scored in npu_ranks.run(world_size, together, options):
        assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in expected]
        for name, logprobs in scores.items():
            assert scored[name] == pytest.approx(logprobs, abs=5e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights."""
    folder = tmp_path_factory.mktemp("model") / "random"
    source = RandomSource(WIDE.model_copy(update={"seq_length": 512}), seed=1, std=0.15)
    write_random_model(folder, source, tiny_tokenizer_folder())
    return folder


LINES: list[dict[str, Any]] = [
    {"prompt": "the quick brown fox", "greedy": True},
    {"prompt": "the lazy dog", "temperature": 1.5, "top_k": 40, "seed": 7},
    {"prompt": "the quick brown fox jumps over a lazy dog while", "num_beams": 3},
    {"messages": [{"role": "user", "content": "北京 天气"}], "repetition_penalty": 1.2},
]


def from_file(options: dict[str, Any]) -> list[Any]:
    """Returns the results of a prompts file, on rank 0."""
    from glm3cli.config.inference import GenerateConfig
    from glm3cli.infer.prompts.run import continue_file

    found: list[Any] = []
    continue_file(GenerateConfig.parse(options), lambda result: found.append(dict(result)), id)
    return found


def served(ask: Asking) -> Any:
    """Asks a server for texts, drawn and greedy, and for an answer of a format."""
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    drawn = complete(ask, ["the lake", "seven"], n=2, temperature=1, seed=3)
    scored = complete(ask, "the lazy dog", echo=True, logprobs=2)
    return {
        "drawn": [choice.text for choice in drawn.choices],
        "scored": scored.choices[0].text,
        "logprobs": scored.choices[0].logprobs.token_logprobs[1:],
        "streamed": gathered(say(ask, stream=True)),
        "schema": say(ask, response_format=schema, max_tokens=30).choices[0].message.content,
    }


@pytest.mark.parametrize("sizes", ["one rank", pytest.param("tp2", marks=pytest.mark.slow), "pp2"])
def test_a_prompts_file_and_a_server_give_the_cpus_texts(
    ranks: RankPool, npu_ranks: RankPool, model: Path, tmp_path: Path, sizes: str
) -> None:
    world_size, options = SIZES[sizes]
    (tmp_path / "p").write_text("".join(f"{json.dumps(line)}\n" for line in LINES), "utf-8")
    asked = {"model": model, "prompts_file": tmp_path / "p", "max_new_tokens": 8, "logprobs": True}
    found: dict[str, Any] = {}
    for device, pool in {"cpu": ranks, "npu": npu_ranks}.items():
        given = {**options, "device": device, "dtype": "fp32"}
        [results, *_] = pool.run(world_size, from_file, {**asked, **given})
        [answers, *_] = pool.run(world_size, serve_for, served, model, given)
        logprobs = [*answers.pop("logprobs"), *(p for one in results for p in one.pop("logprobs"))]
        found[device] = results, answers, logprobs
    assert found["npu"][:2] == found["cpu"][:2]
    assert found["npu"][2] == pytest.approx(found["cpu"][2], abs=1e-5)
    assert len(found["cpu"][0]) == len(LINES)
