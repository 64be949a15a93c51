"""`Conversation`: a chat with a model, turn by turn."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glm3cli.config.inference import GenerateConfig
from glm3cli.data.tokens.chat import Message, build_prompt, parse_reply, system_turn
from glm3cli.infer.model import Model
from glm3cli.infer.sampling import Sampling


@dataclass
class Conversation:
    """A chat with a model.

    Every rank of the model must call the same methods with the same arguments.

    Attributes:
        model: The model that answers.
        config: The settings; the system text, the length of the longest answer, and the seed count.
        sampling: The rule by which tokens are drawn.
        tools: The tools that the model may call, as JSON values; None for none.
        history: The turns so far.
    """

    model: Model
    config: GenerateConfig
    sampling: Sampling
    tools: Any = None
    history: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts anew: forgets all turns but the system's, if there is one."""
        turn = system_turn(self.config.system or "", self.tools)
        self.history = [turn] if turn else []

    def answer(self, text: str, on_text: Callable[[str], None]) -> Message:
        """Adds a turn of the user, and the model's answer to it.

        After an answer that calls a tool, the turn counts as what the tool has returned.

        Args:
            text: The text of the user's turn.
            on_text: Called on rank 0 with the answer, piece by piece.

        Returns:
            The answer.
        """
        last = self.history[-1] if self.history else None
        called = last is not None and last.role == "assistant" and bool(last.metadata)
        self.history.append(Message("observation" if called else "user", text))
        [generation] = self.model.continue_ids(
            [build_prompt(self.model.tokenizer, self.history)],
            self.config.max_new_tokens,
            self.sampling,
            self.config.seed + len(self.history),
            on_text,
        )
        reply = parse_reply(self.model.tokenizer.decode(generation.token_ids))
        self.history.append(reply)
        return reply
