"""How fast generation is, beside transformers, in one process with two threads.

    python -m tests.benchmarks.bench_generate --rounds 5

continues random prompts greedily by our engine and by transformers' GlmForCausalLM, with the same
random weights in fp32 (8 layers, hidden size 512, ChatGLM3's vocabulary). The ways take turns, and
must give the same tokens; the times are medians. Decoding is what the tokens after the first one
take: the time of a whole answer less that of an answer of one token. Its bound is that of the
memory: how often a second a sum over as many bytes as the weights have, which each token reads, is
done in between.
`--large` has a model of about a billion parameters, in fp32 and bf16. `--ranks` compares two ranks
of one thread with the one process, when 64 texts are continued in passes of 16 at most, and when
there are but 16; with stages as `glm3 generate` makes them, seven layers and one, since the output
layer has as many weights as ten of them, and with equal ones. `--profile` says where the time of a
decoding step goes.
"""

import argparse
import json
import operator
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ParallelConfig

SMALL = {
    "num_layers": 8,
    "hidden_size": 512,
    "ffn_hidden_size": 1712,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 64,
    "padded_vocab_size": 65024,
    "seq_length": 8192,
    "torch_dtype": "fp32",
}
LARGE = SMALL | {
    "num_layers": 16,
    "hidden_size": 2048,
    "ffn_hidden_size": 6848,
    "num_attention_heads": 16,
    "kv_channels": 128,
}
# The operators of each kind of work, by a part of their names; the rest are small ones.
KINDS = {"products": "_linear_pointwise", "attention": "_scaled_dot_product", "messages": "c10d::"}
MIXED = [8, 200, 30, 60, 12, 120, 250, 16, 90, 40, 24, 150, 70, 10, 300, 50]
Prompts = Sequence[Sequence[int]]
Way = Callable[[Prompts, int], list[list[int]]]


def prompts_of(lengths: Sequence[int], seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Returns random prompts, whose first `shared` tokens are the same."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(10, 60000, (count,), generator=generator).tolist()

    beginning = draw(shared)
    return [[*beginning, *draw(length - shared)] for length in lengths]


def random_source(model: ModelConfig) -> Any:
    from glm3cli.checkpoint.random import RandomSource

    return RandomSource(model, seed=1, std=0.05)


def open_engine(stack: ExitStack, shape: dict[str, Any], dtype: str, **sizes: int) -> Any:
    """Opens our engine in this process, or on this rank."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    model = ModelConfig(**shape)
    parallel = ParallelConfig(**sizes).balanced(model)
    grid = stack.enter_context(open_grid(parallel))
    return Engine(random_source(model), parallel, dtype, grid, max_batch_size=16)


def few_bits(engine: Any, shape: dict[str, Any], dtype: str, rounds: int) -> None:
    """Compares weights of 8 and 4 bits with exact ones; the tokens needn't be equal."""
    from glm3cli.infer.engine import Engine

    source = random_source(ModelConfig(**shape))
    ways = {
        f"int{bits}": by_engine(Engine(source, ParallelConfig(), dtype, engine.grid, bits=bits))
        for bits in (4, 8)
    }
    times, equal = alternate({**ways, "exact": by_engine(engine)}, prompts_of([16]), 32, rounds)
    line(f"{dtype}, batch 1, --quantize", 32, times, equal)


def by_engine(engine: Any) -> Way:
    from glm3cli.infer.requests import Request
    from glm3cli.infer.sampling import Sampling

    def run(prompts: Prompts, length: int) -> list[list[int]]:
        for lane in engine.batching.lanes:
            lane.forget()  # what earlier rounds have read
        requests = [Request(p, Sampling(), length, logprobs=None) for p in prompts]
        return [one.token_ids for one in engine.answer(requests)]

    return run


def by_generate(glm: Any) -> Way:
    """Returns transformers' `generate`, with prompts padded on the left."""

    def run(prompts: Prompts, length: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            found = glm.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=length, pad_token_id=0
            )
        return found[:, longest:].tolist()

    return run


def by_generate_batch(glm: Any) -> Way:
    """Returns transformers' continuous batching."""
    from transformers import GenerationConfig

    def run(prompts: Prompts, length: int) -> list[list[int]]:
        config = GenerationConfig(do_sample=False, max_new_tokens=length, pad_token_id=0)
        found = glm.generate_batch(
            [list(p) for p in prompts], generation_config=config, progress_bar=False
        )
        return [one.generated_tokens for one in found.values()]

    return run


def alternate(
    ways: dict[str, Way], prompts: Prompts, length: int, rounds: int
) -> tuple[dict[str, float], bool]:
    """Returns the median seconds of each way, and whether all gave the same tokens."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    equal = True
    for turn in range(rounds + 1):
        tokens = []
        for name, way in ways.items():
            started = time.perf_counter()
            tokens.append(way(prompts, length))
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - started)
        equal &= all(one == tokens[0] for one in tokens)
    return {name: statistics.median(one) for name, one in times.items()}, equal


def read_bytes(shape: dict[str, Any], dtype: str) -> int:
    """Returns the bytes of weights that one decoded token reads: all but the embedding."""
    model = ModelConfig(**shape)
    width = 4 if dtype == "fp32" else 2
    return (model.num_parameters - model.padded_vocab_size * model.hidden_size) * width


def decode(name: str, ways: dict[str, Way], length: int, rounds: int, weights: int) -> None:
    """Prints a row about the tokens of one prompt after the first one."""
    prompts, numbers = prompts_of([16]), torch.ones(weights // 4)
    times: dict[str, list[float]] = {name: [] for name in ways}
    reads, equal = [], True
    for turn in range(rounds + 1):
        answers = []
        for way_name, way in ways.items():
            moments = [time.perf_counter()]
            numbers.sum()
            for count in (1, 1 + length):
                moments.append(time.perf_counter())
                answers.append(way(prompts, count))
            read, first, whole = map(operator.sub, [*moments[1:], time.perf_counter()], moments)
            if turn:  # the first round warms up
                reads.append(read)
                times[way_name].append(whole - first)
        equal &= all(one == answers[1] for one in answers[1::2])
    medians = {way_name: statistics.median(one) for way_name, one in times.items()}
    bound = 1 / statistics.median(reads)
    share = length / next(iter(medians.values())) / bound
    more = f"; {share:.0%} of the bound of {bound:.1f} ({weights * bound / 1e9:.0f} GB/s)"
    line(name, length, medians, equal, more)


def line(name: str, tokens: int, times: dict[str, float], equal: bool, more: str = "") -> None:
    ours, *others = times.items()
    text = f"{name:34} {ours[0]} {tokens / ours[1]:8.1f} tokens/s"
    for other, seconds in others:
        text += f"; {other} {tokens / seconds:8.1f}, {seconds / ours[1]:5.2f} x"
    print(f"{text}; tokens {'equal' if equal else 'DIFFER'}{more}", flush=True)


def compare(shape: dict[str, Any], dtype: str, rounds: int, *, all_rows: bool) -> None:
    """Prints the rows of one model."""
    from tests.support import reference

    with ExitStack() as stack:
        engine = open_engine(stack, shape, dtype)
        glm = reference.build(ModelConfig(**shape), random_source(ModelConfig(**shape)))
        glm = glm.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
        glm.generation_config.eos_token_id = None
        ways = {"ours": by_engine(engine), "generate": by_generate(glm)}
        weights = read_bytes(shape, dtype)
        length = 64 if all_rows else 16
        decode(f"{dtype}, batch 1, decoding", ways, length, rounds, weights)
        few_bits(engine, shape, dtype, rounds)
        if not all_rows:
            return
        times, equal = alternate(ways, prompts_of([16]), 64, rounds)
        line("batch 1", 64, times, equal)
        times, equal = alternate(ways, prompts_of([16] * 16), 64, rounds)
        line("batch 16", 16 * 64, times, equal)
        times, equal = alternate(ways, prompts_of([1024]), 1, rounds)
        line("prefill of 1,024", 1024, times, equal)
        ways["generate_batch"] = by_generate_batch(glm)
        # With seed 0 two tokens are as likely as each other to five digits.
        times, equal = alternate(ways, prompts_of(MIXED, seed=1), 64, max(1, rounds // 2))
        line("batch 16 of mixed lengths", 16 * 64, times, equal)
        shared_prefix(engine, rounds)
        row = engine.batching.lanes[0].cache.slots
        expected = 2 * 8 * 2 * 64 * 4 * row.size(2) * row.size(4)
        print(f"cache: {row.numel() * 4:,} bytes, {expected:,} by the formula")


def shared_prefix(engine: Any, rounds: int) -> None:
    """Compares 64 prompts that share 600 tokens with as many that share none."""
    import glm3cli.infer.rows as rows

    reused = by_engine(engine)

    def alone(prompts: Prompts, length: int) -> list[list[int]]:
        least, rows.SHARED_AT_LEAST = rows.SHARED_AT_LEAST, 10**9
        try:
            return reused(prompts, length)
        finally:
            rows.SHARED_AT_LEAST = least

    prompts = prompts_of([616] * 64, shared=600)
    times, equal = alternate({"reused": reused, "alone": alone}, prompts, 8, max(1, rounds // 2))
    line("64 prompts that share 600 tokens", 64 * 8, times, equal)


def on_rank(sizes: str, count: int, rounds: int) -> None:
    """Prints the seconds of so many texts on rank 0; for a process of its own."""
    given = json.loads(sizes)
    with ExitStack() as stack:
        way = by_engine(open_engine(stack, SMALL, "fp32", **given))
        times, _ = alternate({"ours": way}, prompts_of([16] * count), 64, rounds)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(times["ours"]), flush=True)


def on_ranks(sizes: dict[str, Any], count: int, rounds: int) -> float:
    """Returns the seconds of so many texts at these parallel sizes, in processes of their own."""
    ranks = sizes.get("tp", 1) * sizes.get("pp", 1)
    module = ["-m", "tests.benchmarks.bench_generate"]
    command = [sys.executable, "-W", "ignore", *module]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", *module]
    words = ["--on-rank", json.dumps(sizes), "--texts", str(count), "--rounds", str(rounds)]
    done = subprocess.run(
        [*command, *words],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(2 // ranks)},
    )
    return float(done.stdout.splitlines()[-1])


def compare_ranks(count: int, rounds: int) -> None:
    """Prints how fast so many texts are continued in passes of 16, by each way."""
    ways: dict[str, dict[str, Any]] = {
        "one process": {},
        "tp 2": {"tp": 2},
        "pp 2": {"pp": 2},
        "pp 2, equal": {"pp": 2, "layers_per_stage": "4,4"},
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, sizes in ways.items():
            rates[name].append(count * 64 / on_ranks(sizes, count, rounds))
    for name, found in rates.items():
        rate = statistics.median(found)
        share = rate / statistics.median(rates["one process"])
        print(f"{count} texts, {name:12} {rate:8.1f} tokens/s, {share:.2f} of one process")


def profile(shape: dict[str, Any], dtype: str, count: int) -> None:
    """Prints what shares of a decoding step of so many texts the kinds of work have."""
    from glm3cli.infer.requests import Request
    from glm3cli.infer.sampling import Sampling

    with ExitStack() as stack:
        engine = open_engine(stack, shape, dtype)
        for prompt in prompts_of([16] * count):
            engine.add(Request(prompt, Sampling(), 64, logprobs=None))
        for _ in range(8):
            engine.step()
        with torch.profiler.profile() as profiler:
            started = time.perf_counter()
            for _ in range(20):
                engine.step()
            seconds = time.perf_counter() - started
    found: Counter[str] = Counter()
    for one in profiler.key_averages():
        kind = next((name for name, part in KINDS.items() if part in one.key), "small operators")
        found[kind] += one.self_cpu_time_total / 1e6
    found["Python"] = seconds - sum(found.values())
    shares = ", ".join(f"{name} {spent / seconds:.0%}" for name, spent in found.most_common())
    print(f"{dtype}, batch {count}: {seconds / 20 * 1e3:.1f} ms a step; {shares}", flush=True)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of one process")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--on-rank", help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=int, default=16, help=argparse.SUPPRESS)
    given = parser.parse_args()
    from glm3cli.device import select

    select("cpu").activate()
    if given.on_rank:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        on_rank(given.on_rank, given.texts, given.rounds)
        return
    torch.set_num_threads(given.threads)
    if given.ranks:
        for count in (64, 16):
            compare_ranks(count, given.rounds)
        return
    if given.profile:
        for dtype in ("fp32", "bf16") if given.large else ("fp32",):
            for count in (1, 16):
                profile(LARGE if given.large else SMALL, dtype, count)
        return
    if given.large:
        for dtype in ("fp32", "bf16"):
            compare(LARGE, dtype, given.rounds, all_rows=False)
        return
    compare(SMALL, "fp32", given.rounds, all_rows=True)


if __name__ == "__main__":
    main()
