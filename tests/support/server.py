"""A server on the ranks of a pool, and a scenario that asks it, which runs on rank 0."""

import functools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from glm3cli.config.inference import GenerateConfig
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.infer.serve.run import serve


class Asking:
    """Asks a server.

    Attributes:
        url: The URL of the server.
        tokenizer: The tokenizer of its model.
        folder: The folder in which the model's folder stands.
        client: OpenAI's own client, which tries nothing twice.
        model: The name of the model.
    """

    def __init__(self, url: str, tokenizer: Tokenizer, key: str = "none") -> None:
        self.url, self.tokenizer = url, tokenizer
        self.folder = tokenizer.path.parents[1]
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)

    @functools.cached_property
    def model(self) -> str:
        return self.client.models.list().data[0].id


def serve_for(scenario: Callable[[Asking], Any], model: Path, options: dict[str, Any]) -> Any:
    """Runs on a rank of a pool: serves until a scenario on rank 0 has ended; returns its result.

    The server ends as it does for its users, by SIGTERM.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def ask(url: str) -> None:
        asking = Asking(url, Tokenizer.load(model))
        try:
            with asking.client:
                results.append(scenario(asking))
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
