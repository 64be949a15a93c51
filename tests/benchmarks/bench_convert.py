"""How fast conversions of ChatGLM3-6B are, beside `cp` of the same bytes on the same disk.

    python tests/benchmarks/bench_convert.py --folder DISK --rounds 3

makes a random model (28 layers, fp16, seven .bin shards) in a new folder on that disk, converts it
to tp1pp2, tp2pp4 and `dist` and from each of these back, and copies the same source by `cp` right
before every conversion. Each runs in a process of its own; that all is on the disk counts too.
The table has the medians. What was made is removed again.

A virtual machine may hand free memory back to its host within seconds; to get it again makes
writing a file up to ten times slower. What follows a deletion at once is spared that, and so is
what finds the memory full of other files, which give way. So that copies and conversions begin
alike, a copy of the same bytes is made and removed before each of them, and the program waits
(--settle) before it measures.

--layers 2 makes a small model of the same tensors. --cold empties the page cache before every
measurement, of the whole machine: as root, and on a machine of one's own only.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from glm3cli.checkpoint.names import slots
from glm3cli.config.model import ModelConfig
from glm3cli.host.files import sync

SHARDS = 7


@dataclass
class Row:
    """All that was measured of one conversion."""

    seconds: list[float] = field(default_factory=list)
    copying: list[float] = field(default_factory=list)
    peak: int = 0
    size: int = 0

    def cells(self, name: str) -> str:
        seconds, copying = statistics.median(self.seconds), statistics.median(self.copying)
        return (
            f"| {name} | {seconds:.1f} | {copying:.1f} | {seconds / copying:.2f} | "
            f"{self.size / 1e9 / seconds:.2f} | {self.peak / 2**20:.0f} |"
        )


@dataclass
class Bench:
    """A folder with the model `hf` in it, and how to measure."""

    folder: Path
    flags: list[str]
    cold: bool
    settle: float
    rows: dict[str, Row] = field(default_factory=dict)

    def run_round(self, conversions: dict[str, list[str]]) -> None:
        """Every conversion once, there and back, each after a copy of the same bytes."""
        for name, arguments in conversions.items():
            there = self.folder / name
            self.convert(f"hf -> {name}", self.folder / "hf", there, ["hf2mg", *arguments])
            self.convert(f"{name} -> hf", there, self.folder / "back", ["mg2hf"])
            shutil.rmtree(there)
            shutil.rmtree(self.folder / "back")

    def convert(self, label: str, source: Path, target: Path, command: list[str]) -> None:
        row = self.rows.setdefault(label, Row())
        copy = self.folder / "copy"
        copying = 0.0
        for _ in range(2):  # the first one leaves the memory to the second as that to what follows
            copying, _ = self.measure(["cp", "-r", str(source), str(copy)], copy)
            shutil.rmtree(copy)
        program = [sys.executable, "-m", "glm3cli", "convert", command[0], str(source), str(target)]
        seconds, peak = self.measure([*program, *command[1:], *self.flags], target)
        row.copying.append(copying)
        row.seconds.append(seconds)
        row.peak = max(row.peak, peak)
        row.size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        say(f"{label}: {seconds:.1f} s, cp {copying:.1f} s, peak {peak / 2**20:.0f} MiB")

    def measure(self, command: list[str], target: Path) -> tuple[float, int]:
        """Seconds until all of `target` is on the disk, and the highest private memory."""
        if self.cold:
            Path("/proc/sys/vm/drop_caches").write_text("1")
        time.sleep(self.settle)
        start = time.monotonic()
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
            peak = [0]
            watcher = threading.Thread(target=watch, args=(process.pid, peak))
            watcher.start()
            try:
                process.wait()
            finally:
                process.kill()  # nothing to do unless we are stopped
                process.wait()
            watcher.join()
            sync(target)
            seconds = time.monotonic() - start
            if process.returncode:
                log.seek(0)
                sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()}")
        return seconds, peak[0]


def watch(process: int, peak: list[int]) -> None:
    """Samples RssAnon, the memory that isn't backed by a file, until the process has ended."""
    while True:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return
        values = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
        if not values:  # a process that has ended but was not waited for has no memory
            return
        peak[0] = max(peak[0], int(values[0]) * 1024)
        time.sleep(0.01)


def model_of(layers: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=4096,
        ffn_hidden_size=13696,
        num_attention_heads=32,
        num_query_groups=2,
        kv_channels=128,
        padded_vocab_size=65024,
        seq_length=8192,
        torch_dtype="fp16",
    )


def make_source(folder: Path, model: ModelConfig, kind: str) -> None:
    """A Hugging Face folder of random weights, one shard in memory at a time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    every = list(slots(model))
    size = -(-len(every) // SHARDS)
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    places = {}
    for i in range(SHARDS):
        shard = {
            weight.name("chatglm", layer): torch.randn(weight.shape(model)).half()
            for weight, layer in every[i * size : (i + 1) * size]
        }
        path = folder / f"{stem}-{i + 1:05d}-of-{SHARDS:05d}.{kind}"
        if kind == "bin":
            torch.save(shard, path)
        else:
            save_file(shard, path, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, path.name)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def conversions_of(layers: int) -> dict[str, list[str]]:
    pp = 4 if layers % 4 == 0 else 2
    return {
        "tp1pp2": ["--tp", "1", "--pp", "2"],
        f"tp2pp{pp}": ["--tp", "2", "--pp", str(pp)],
        "dist": ["--format", "dist"],
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk")
    parser.add_argument("--layers", type=int, default=28, help="an even number; 28 is the 6B model")
    parser.add_argument("--kind", choices=["bin", "safetensors"], default="bin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-verify", action="store_true", help="without reading back")
    parser.add_argument("--settle", type=float, default=8, help="seconds before each measurement")
    parser.add_argument("--cold", action="store_true", help="empty the page cache each time")
    options = parser.parse_args()
    # By default SIGTERM would end us without removing anything.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    model = model_of(options.layers)
    num_bytes = 2 * model.num_parameters
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=options.folder) as name:
        folder = Path(name).resolve()
        needed = 4 * num_bytes  # the source, a conversion, its way back or a copy, and some room
        if shutil.disk_usage(folder).free < needed:
            sys.exit(f"{folder} needs {needed / 1e9:.0f} GB free")
        say(f"making a model of {num_bytes / 1e9:.1f} GB")
        make_source(folder / "hf", model, options.kind)
        flags = ["--no-verify"] if options.no_verify else []
        bench = Bench(folder, flags, options.cold, options.settle)
        for _ in range(options.rounds):
            bench.run_round(conversions_of(options.layers))
    print(
        f"{num_bytes / 1e9:.2f} GB, {options.kind}, {os.cpu_count()} cores, page cache "
        f"{'emptied' if options.cold else 'as it was'}, torch {torch.__version__}, median of "
        f"{options.rounds}, {'not verified' if options.no_verify else 'verified'}"
    )
    print("| conversion | seconds | cp | ratio | GB/s | peak private MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in bench.rows.items():
        print(row.cells(name))


if __name__ == "__main__":
    main()
