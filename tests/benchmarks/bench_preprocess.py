"""How fast text is preprocessed, beside the plain way and ModelLink's, in one run.

    apt-get download manpages-zh debian-reference-zh-cn libreoffice-help-zh-cn ...
    for package in *.deb; do dpkg -x $package chinese; done; gunzip -rf chinese
    python tests/benchmarks/bench_preprocess.py --tokenizer DIR --chinese chinese --rounds 3

gathers text of this machine that doesn't repeat (documentation, licences, source: --text FOLDER
...) and Chinese documentation, and turns it into tokens: by `glm3 preprocess` with one worker and
with all cores; by sentencepiece, one call per document, and megatron-core's IndexedDatasetBuilder
(the plain way); and by a slow tokenizer of transformers that does what ChatGLM3's remote code does,
as ModelLink 1.1 calls it. The files are compared: all must be equal. Times are those of reading,
encoding and writing, without imports.

--memory-mb 2000 makes an input of that size instead and samples the memory of all processes.
"""

import argparse
import html
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

KINDS = {".py", ".pyi", ".txt", ".md", ".rst", ".html", ".po", ".h", ".c", ".json", ".xml", ""}
PREFIX_TOKENS = ("[gMASK]", "sop")


def english(folders: list[Path], num_bytes: int) -> Iterator[str]:
    """Returns text files of this machine, without duplicates."""
    seen, size = set(), 0
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix not in KINDS or not path.is_file() or path.stat().st_size > 2e6:
                continue
            try:
                text = path.read_text("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if len(text) < 20 or hash(text) in seen:
                continue
            seen.add(hash(text))
            size += len(text.encode())
            yield text
            if size >= num_bytes:
                return


def chinese(folders: list[Path]) -> Iterator[str]:
    """The text of all files that are Chinese for a fifth at least, without mark-up."""
    seen = set()
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if not path.is_file() or path.stat().st_size > 5e6:
            continue
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        text = re.sub(r"\n\s*\n+", "\n\n", html.unescape(re.sub(r"<[^>]*>", "", text)))
        share = len(re.findall("[\u4e00-\u9fff]", text)) / max(len(text), 1)
        if share >= 0.2 and len(text) >= 100 and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def make_input(path: Path, texts: list[str], num_bytes: int) -> int:
    """JSON lines of these texts, again and again up to a size; the bytes of the texts."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < num_bytes:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
                if size >= num_bytes:
                    break
    return size


def plain(source: Path, tokenizer: Path, prefix: Path) -> float:
    """One process, one call of sentencepiece per document, megatron-core's builder."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    start_ids = [pieces.get_piece_size() + i for i in (1, 3)]
    return _build(source, prefix, lambda text: [*start_ids, *pieces.encode(text)])


def modellink(source: Path, tokenizer: Path, prefix: Path) -> float:
    """transformers' slow tokenizer, one document at a time, megatron-core's builder."""
    import sentencepiece
    import transformers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    count = pieces.get_piece_size()

    class Slow(transformers.PreTrainedTokenizer):  # type: ignore[misc]
        """What tokenization_chatglm.py does for text without special tokens."""

        @property
        def vocab_size(self) -> int:
            return count + 9

        def get_vocab(self) -> dict[str, int]:
            return {pieces.id_to_piece(i): i for i in range(count)}

        def _tokenize(self, text: str, **_options: object) -> list[str]:
            tokens: list[str] = pieces.EncodeAsPieces(text)
            return tokens

        def _convert_token_to_id(self, token: str) -> int:
            return int(pieces.PieceToId(token))

        def _convert_id_to_token(self, index: int) -> str:
            return str(pieces.IdToPiece(index))

        def build_inputs_with_special_tokens(
            self, token_ids_0: list[int], token_ids_1: list[int] | None = None
        ) -> list[int]:
            return [count + 1, count + 3, *token_ids_0]

    slow = Slow()

    def encode(text: str) -> list[int]:
        tokens = slow.convert_tokens_to_ids(slow.tokenize(text))
        return slow.build_inputs_with_special_tokens(tokens)

    return _build(source, prefix, encode)


def _build(source: Path, prefix: Path, encode: Any) -> float:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    start = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=np.int32)
    with source.open(encoding="utf-8") as lines:
        for line in lines:
            builder.add_item(torch.tensor(encode(json.loads(line)["text"]), dtype=torch.int32))
            builder.end_document()
    builder.finalize(f"{prefix}_text_document.idx")
    return time.perf_counter() - start


def ours(source: Path, tokenizer: Path, prefix: Path, workers: int, peak: list[int]) -> float:
    """The program itself; notes the highest memory of all its processes together."""
    command = [sys.executable, "-m", "glm3cli", "preprocess", "--json", "--force"]
    command += ["--input", str(source), "--tokenizer", str(tokenizer)]
    command += ["--output-prefix", str(prefix), "--workers", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    watcher = threading.Thread(target=watch, args=(process.pid, peak))
    watcher.start()
    stdout, _ = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return float(json.loads(stdout)["seconds"])


def watch(pid: int, peak: list[int]) -> None:
    """Samples the memory of a process and its children: private, and their share of the rest."""
    while True:
        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            sizes = [member.memory_full_info().pss for member in family]
            if process.status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            if not psutil.pid_exists(pid):
                return
            continue
        peak[0] = max(peak[0], sum(sizes))
        time.sleep(0.1)


def measure(function: Any, *arguments: Any) -> float:
    """Runs one of the other ways in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(function, arguments))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(folder: Path, names: list[str]) -> None:
    """Ends the program unless all ways have written the same files."""
    for kind in ("bin", "idx"):
        contents = {(folder / f"{name}_text_document.{kind}").read_bytes() for name in names}
        if len(contents) > 1:
            sys.exit(f"the .{kind} files differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder")
    parser.add_argument("--chinese", type=Path, nargs="+", required=True, help="folders")
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share"]
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(path) for path in paths])
    parser.add_argument("--mb", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-mb", type=float)
    options = parser.parse_args()
    texts = list(chinese(options.chinese))
    chinese_bytes = sum(len(text.encode()) for text in texts)
    texts += english(options.text, int(options.mb * 1e6) - chinese_bytes)
    random.Random(0).shuffle(texts)
    with tempfile.TemporaryDirectory(prefix="bench-preprocess-") as name:
        folder = Path(name)
        source = folder / "in.jsonl"
        wanted = options.memory_mb or sum(len(text.encode()) for text in texts) / 1e6
        megabytes = make_input(source, texts, int(wanted * 1e6)) / 1e6
        cores = os.cpu_count() or 1
        say(
            f"{len(texts):,} texts, {megabytes:.1f} MB, {chinese_bytes / 1e6:.1f} MB of them "
            f"Chinese, {cores} cores"
        )
        if options.memory_mb:
            for workers in (1, cores):
                peak = [0]
                seconds = ours(source, options.tokenizer, folder / "ours", workers, peak)
                print(
                    f"{megabytes:.0f} MB, {workers} workers: {megabytes / seconds:.1f} MB/s, "
                    f"peak {peak[0] / 2**20:.0f} MiB"
                )
            return
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(options.rounds):
            for name, workers in {"ours, 1 worker": 1, f"ours, {cores} workers": cores}.items():
                target = folder / f"ours{workers}"
                found[name].append(ours(source, options.tokenizer, target, workers, [0]))
            for name, way in {"plain": plain, "ModelLink's": modellink}.items():
                seconds = measure(way, source, options.tokenizer, folder / way.__name__)
                found[name].append(seconds)
            compare(folder, ["ours1", f"ours{cores}", "plain", "modellink"])
            say("  ".join(f"{name}: {values[-1]:.1f} s" for name, values in found.items()))
        medians = {name: statistics.median(values) for name, values in found.items()}
        print("| way | seconds | MB/s | to plain | to ModelLink's |")
        print("| --- | --- | --- | --- | --- |")
        for name, seconds in medians.items():
            ratios = [medians[other] / seconds for other in ("plain", "ModelLink's")]
            print(
                f"| {name} | {seconds:.1f} | {megabytes / seconds:.1f} | {ratios[0]:.1f} | "
                f"{ratios[1]:.1f} |"
            )


if __name__ == "__main__":
    main()
