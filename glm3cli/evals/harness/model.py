"""The model that lm-evaluation-harness calls on rank 0, and what the other ranks do meanwhile."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from glm3cli.evals.harness.scorer import OnResults, Request, Scorer, ignore
from glm3cli.evals.harness.template import as_text

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from glm3cli.infer.model import Model

Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]


class Ranks:
    """Makes all ranks answer what rank 0 is asked.

    lm-evaluation-harness runs on rank 0 alone: its files are read, its cache is kept, and its
    code is run, once.
    """

    def __init__(self, model: "Model", batch_size: int) -> None:
        self._scorer = Scorer(model.engine, model.tokenizer, batch_size)
        self._grid = model.engine.grid

    def ask(self, kind: Kind, requests: list[Request], on_results: OnResults = ignore) -> list[Any]:
        """Answers requests on all ranks; rank 0 calls it while the others `serve`."""
        self._tell((kind, requests))
        found: list[Any] = getattr(self._scorer, kind)(requests, on_results)
        return found

    def serve(self) -> None:
        """Answers what rank 0 asks until it has ended."""
        while (asked := self._tell(None)) is not None:
            kind, requests = asked
            getattr(self._scorer, kind)(requests)

    @contextmanager
    def served(self) -> Iterator[None]:
        """Lets the other ranks end when the block does, however that is."""
        try:
            yield
        finally:
            self._tell(None)

    def _tell(self, value: tuple[Kind, list[Request]] | None) -> tuple[Kind, list[Request]] | None:
        """Returns, on every rank, the `value` of rank 0."""
        if self._grid.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]


class Answers:
    """The methods of lm-evaluation-harness's model, which hand requests on to all ranks.

    It is mixed with `lm_eval.api.model.LM`, so that it needs no import of it.
    """

    cache_hook: Any

    def __init__(self, ranks: Ranks, tokenizer_name: str) -> None:
        """Takes what answers requests, and the name of the tokenizer in the harness's caches."""
        super().__init__()
        self._ranks = ranks
        self._tokenizer_name = tokenizer_name

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Answers as `Scorer.loglikelihood` does."""
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Answers as `Scorer.loglikelihood_rolling` does."""
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers as `Scorer.generate_until` does."""
        return self._ask("generate_until", requests)

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as a text."""
        return as_text(chat_history, begins_answer=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the name of the template, which the harness notes."""
        return "chatglm3" if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes the tokenizer and the template from others."""
        return self._tokenizer_name

    def _ask(self, kind: Kind, requests: Sequence[Any]) -> list[Any]:
        """Answers requests, and puts results into the harness's cache as they come.

        A run that was killed goes on from there. What is drawn isn't kept, as in the harness.
        """
        asked = [tuple(request.args) for request in requests]

        def keep(found: Mapping[int, Any]) -> None:
            for place, result in found.items():
                if kind != "generate_until" or not asked[place][1].get("do_sample", False):
                    self.cache_hook.add_partial(kind, asked[place], result)

        return self._ranks.ask(kind, asked, keep)


def model_of(ranks: Ranks, tokenizer_name: str) -> "LM":
    """Returns the model that lm-evaluation-harness calls.

    Args:
        ranks: Answer its requests.
        tokenizer_name: What distinguishes the tokenizer from others, for the harness's caches.
    """
    from lm_eval.api.model import LM

    class Model(Answers, LM):
        """The model of lm-evaluation-harness."""

    return Model(ranks, tokenizer_name)
