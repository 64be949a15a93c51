"""How fast `glm3 generate --serve` is under load, beside `transformers serve`, on this machine.

    python -m tests.benchmarks.bench_serve --tokenizer DIR --rounds 3

serves a model of random weights (8 layers, hidden size 512, ChatGLM3's vocabulary) in fp32 with two
threads, and asks it with streams: one client alone, and sixteen at once, all of which want 64
tokens for a prompt of their own. `transformers serve --continuous-batching` gets the same questions
about the same weights, if fastapi is there (`--peer-path DIR` has it where it isn't installed). A
third server has two copies of the model, each with one thread. The servers take turns; rates are
medians. Then 200 clients come at once and 150 of them leave, which
must leave no place taken.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tests.benchmarks.bench_generate import SMALL, random_source
from tests.support.ports import free_port

NEW_TOKENS = 64
NUM_CLIENTS = 16
WORDS = "lake wind winter bird stone river light house 湖 天气 北京 冬天"


@dataclass(frozen=True)
class Stream:
    """What one client has seen."""

    first: float  # seconds until the first text
    num_tokens: int


def write_model(folder: Path, tokenizer: Path) -> Path:
    """Writes the model in the layout that transformers opens by itself, too."""
    from glm3cli.checkpoint.convert.random_model import write_random_model
    from glm3cli.config.model import ModelConfig

    write_random_model(folder / "chatglm", random_source(ModelConfig(**SMALL)), tokenizer)
    words = ["convert", "mg2hf", folder / "chatglm", folder / "glm", "--layout", "glm"]
    command = [sys.executable, "-m", "glm3cli", *map(str, words), "--no-verify"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "glm"


@contextmanager
def serving(command: list[str], port: int, folder: Path, **more: str) -> Iterator[str]:
    """Runs a server; yields its URL."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **more}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(until_healthy(url, process))
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


async def until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            assert process.poll() is None, "the server has ended; see its log"
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


def ours(model: Path, port: int, *options: str) -> list[str]:
    words = ["generate", "--model", str(model), "--serve", str(port), "--device", "cpu"]
    return [sys.executable, "-m", "glm3cli", *words, "--served-model-name", str(model), *options]


def theirs(model: Path, port: int) -> list[str]:
    words = ["serve", str(model), "--continuous-batching", "--device", "cpu", "--dtype", "float32"]
    program = "from transformers.cli.transformers import main; main()"
    return [sys.executable, "-c", program, *words, "--port", str(port), "--host", "127.0.0.1"]


def question(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS.split(), k=12))


async def ask(session: aiohttp.ClientSession, url: str, model: str, text: str) -> Stream:
    """Asks for a stream, and reads it to its end."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    started, first, count = time.perf_counter(), 0.0, 0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["delta"].get("content"):
                count += 1
                first = first or time.perf_counter() - started
    return Stream(first, count)


async def crowd(url: str, model: str, count: int, seed: int) -> tuple[float, list[Stream]]:
    """Asks as many clients at once; returns the tokens per second, and what each has seen."""
    draw = random.Random(seed)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        started = time.perf_counter()
        texts = [question(draw) for _ in range(count)]
        found = await asyncio.gather(*(ask(session, url, model, text) for text in texts))
        seconds = time.perf_counter() - started
    # Bytes of a character come as one text: tokens are what was asked for, if none has ended early.
    return NEW_TOKENS * count / seconds, found


def percentile(numbers: list[float], share: float) -> float:
    return sorted(numbers)[min(len(numbers) - 1, int(share * len(numbers)))]


def compare(model: Path, folder: Path, rounds: int, peer_path: str | None) -> None:
    """Prints the rates of both servers, alone and with sixteen clients."""
    sides = {"glm3": ours(model, port := free_port())}
    ports = {"glm3": port}
    more: dict[str, dict[str, str]] = {"glm3": {}, "two copies": {"OMP_NUM_THREADS": "1"}}
    sides["two copies"] = ours(model, ports.setdefault("two copies", free_port()), "--nproc", "2")
    if peer_path is not None or has_fastapi():
        ports["transformers"] = free_port()
        sides["transformers"] = theirs(model, ports["transformers"])
        more["transformers"] = {"PYTHONPATH": peer_path or "", "HF_HUB_OFFLINE": "1"}
    rates: dict[tuple[str, int], list[float]] = {}
    firsts: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds):
        for name, command in sides.items():
            with serving(command, ports[name], folder, **more[name]) as url:
                asyncio.run(crowd(url, str(model), 2, 100))  # warms up
                for count in (1, NUM_CLIENTS):
                    for part in range(3 if count == 1 else 1):
                        seed = 1000 * turn + 10 * count + part
                        rate, found = asyncio.run(crowd(url, str(model), count, seed))
                        rates.setdefault((name, count), []).append(rate)
                        seen = firsts.setdefault((name, count), [])
                        seen += [one.first for one in found]
    for (name, count), found in rates.items():
        seconds = firsts[name, count]
        print(
            f"{name:12} {count:3} clients {statistics.median(found):8.1f} tokens/s; first text "
            f"p50 {percentile(seconds, 0.5) * 1000:.0f} ms, p99 "
            f"{percentile(seconds, 0.99) * 1000:.0f} ms",
            flush=True,
        )
    one, many = (statistics.median(rates["glm3", count]) for count in (1, NUM_CLIENTS))
    print(f"glm3, {NUM_CLIENTS} clients / one: {many / one:.2f} x")
    copies = statistics.median(rates["two copies", NUM_CLIENTS])
    print(f"two copies / one, {NUM_CLIENTS} clients: {copies / many:.2f} x")
    if "transformers" in sides:
        peer = statistics.median(rates["transformers", NUM_CLIENTS])
        print(f"glm3 / transformers serve, {NUM_CLIENTS} clients: {many / peer:.2f} x")


def has_fastapi() -> bool:
    import importlib.util

    return importlib.util.find_spec("fastapi") is not None


async def leave(url: str, model: str) -> str:
    """Lets 200 clients come and 150 leave; returns what became of the others and of the places."""
    draw = random.Random(5)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        texts = [question(draw) for _ in range(200)]
        tasks = [asyncio.create_task(ask(session, url, model, text)) for text in texts]
        await asyncio.sleep(1)
        for task in draw.sample(tasks, 150):
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        whole = [one for one in found if isinstance(one, Stream)]
        async with session.get(f"{url}/metrics") as response:
            text = await response.text()
    places = re.findall(r"glm3_(running|waiting) (\d+)", text)
    return f"{len(whole)} of the other 50 have their answers; {dict(places)}"


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of ChatGLM3's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-path", help="folder that has fastapi")
    parser.add_argument("--leave", action="store_true", help="only the clients that leave")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glm3-bench-") as name:
        folder = Path(name)
        model = write_model(folder, given.tokenizer)
        if not given.leave:
            compare(model, folder, given.rounds, given.peer_path)
        with serving(ours(model, port := free_port()), port, folder) as url:
            print("200 clients, 150 leave:", asyncio.run(leave(url, str(model))))


if __name__ == "__main__":
    main()
