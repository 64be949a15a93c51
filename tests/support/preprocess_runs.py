"""Runs `preprocess` with the small tokenizer and reads the files that it writes."""

import json
from pathlib import Path

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.preprocess.run import preprocess
from glm3cli.data.preprocess.writing.write import Summary
from tests.support.tiny_tokenizer import tiny_tokenizer_folder


def run(
    source: Path | list[Path], prefix: Path, report=lambda progress: None, **options
) -> Summary:
    config = {
        "input": source if isinstance(source, list) else [source],
        "tokenizer": tiny_tokenizer_folder(),
        "output_prefix": prefix,
        "workers": 1,
        **options,
    }
    return preprocess(PreprocessConfig.parse(config), report)


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".idx")
    }
