"""A program that runs `preprocess` and saves its progress after every chunk."""

import json
import sys
from pathlib import Path
from typing import Any

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.preprocess.readers import chunks
from glm3cli.data.preprocess.run import preprocess
from glm3cli.data.preprocess.writing import output
from glm3cli.errors import Glm3Error


def main(values: dict[str, Any], limit: int | None) -> None:
    """Runs `preprocess` with the options `values`; no file may grow beyond `limit` bytes."""
    output._SECONDS_BETWEEN_NOTES = 0.0
    chunks.CHUNK_BYTES, chunks.CHUNK_ROWS = 20_000, 50
    if limit is not None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for name in ("tokenizer", "output_prefix"):
        values[name] = Path(values[name])
    values["input"] = [Path(path) for path in values["input"]]
    config = PreprocessConfig.parse(values)
    print("begins", flush=True)
    try:
        preprocess(config)
    except Glm3Error as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
