"""`Answers`: all ranks answer a prompt together, and stop together."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from glm3cli.errors import ConfigError
from glm3cli.infer.decoding.rules import Decoding
from glm3cli.infer.model import Model
from glm3cli.infer.requests import Generation
from glm3cli.parallel.orders import Orders, told_by_rank_0


@dataclass(frozen=True)
class _Question:
    """What rank 0 gives to the other ranks: token ids, and the seed of the random numbers."""

    prompt: list[int]
    seed: int


class Answers:
    """Answers of a model on all of its ranks: rank 0 asks, and the others follow.

    Nothing but the prompts goes from rank 0 to the others, which know nothing of the chat.
    """

    def __init__(self, model: Model, decoding: Decoding) -> None:
        """Prepares this rank; all ranks must do it.

        Args:
            model: The model that answers.
            decoding: How the answers are made.
        """
        self._model = model
        self._decoding = decoding
        self._orders = Orders(model.engine.grid)

    def ask(
        self,
        prompt: list[int],
        seed: int,
        on_token: Callable[[int], None],
        is_stopped: Callable[[], bool],
    ) -> Generation:
        """Has all ranks answer a prompt; rank 0 calls it.

        Args:
            prompt: The token ids of the prompt.
            seed: The seed of the random numbers.
            on_token: Called with every token as it comes.
            is_stopped: Asked after every token whether the answer ends with it.

        Returns:
            The answer, or what there is of it.

        Raises:
            ConfigError: The prompt is too long for the model.
        """
        question = _Question(prompt, seed)
        self._orders.send(question)
        return self._answer(question, on_token, is_stopped)

    def close(self) -> None:
        """Ends `follow` on the other ranks; rank 0 calls it."""
        self._orders.send(None)

    def follow(self) -> None:
        """Takes part in all answers until rank 0 closes; the other ranks call it."""
        while (question := self._orders.receive()) is not None:
            with contextlib.suppress(ConfigError):  # rank 0 has the same, and shows it
                self._answer(question, lambda _token: None, lambda: False)

    def _answer(
        self, question: _Question, on_token: Callable[[int], None], is_stopped: Callable[[], bool]
    ) -> Generation:
        """Answers a question on this rank; see `ask`."""
        engine = self._model.engine
        room = engine.model.seq_length - len(question.prompt)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(question.prompt):,} tokens, and with its answer the "
                f"model takes {engine.model.seq_length:,}",
                "/clear starts over, and /retry takes the last turn back",
            )
        limit = min(self._decoding.max_new_tokens, room)
        decoding = replace(self._decoding, max_new_tokens=limit)
        [request] = self._model.requests(question.prompt, decoding, question.seed)
        number = engine.add(request)
        answer, num_seen = engine.results[number].token_ids, 0
        while not engine.is_idle:
            engine.step()
            for token in answer[num_seen:]:
                on_token(token)
            num_seen = len(answer)
            if told_by_rank_0(engine.grid, is_stopped()):
                engine.end(number)
        return engine.results.pop(number)
