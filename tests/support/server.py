"""A server on the ranks of a pool, and a scenario that asks it, which runs on rank 0."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai

from glm3cli.config.inference import GenerateConfig
from glm3cli.infer.serve.run import serve

# Asks the server at a URL, and returns what came of it.
Scenario = Callable[[str], Any]


def serve_for(scenario: Scenario, model: Path, options: dict[str, Any]) -> Any:
    """Runs on a rank of a pool: serves until the scenario has ended; returns its result.

    The server ends as it does for its users, by SIGTERM.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def ask(url: str) -> None:
        try:
            results.append(scenario(url))
        except BaseException as error:
            errors.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(url: str) -> None:
        threading.Thread(target=ask, args=(url,)).start()

    given = {"model": model, "serve": "0", "device": "cpu", **options}
    serve(GenerateConfig.parse(given), begin)
    if errors:
        raise errors[0]
    return results[0] if results else None


@contextlib.contextmanager
def client(url: str, key: str = "none") -> Iterator[openai.OpenAI]:
    """OpenAI's own client of a server; it tries nothing twice."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as found:
        yield found
