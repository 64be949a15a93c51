"""Draws tokens from logits, by temperature, top-k and top-p."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.config.inference import COLDEST
from glm3cli.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The rule by which a token is drawn.

    Attributes:
        greedy: Whether to take the likeliest token; the other attributes then don't count.
        temperature: The divisor of the logits, at least `COLDEST`.
        top_k: The number of likeliest tokens among which is drawn; 0 draws among all.
        top_p: The probability that the likeliest tokens, among which is drawn, have together; 1
            draws among all.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Checks the temperature.

        Raises:
            ConfigError: The logits divided by it could be too large for fp32.
        """
        if self.temperature < COLDEST:
            raise ConfigError(
                f"temperature {self.temperature} is below {COLDEST}",
                "take the likeliest token (greedy), or give a higher temperature",
            )


def sample(
    logits: Tensor, rules: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> Tensor:
    """Draws a token for each row.

    Every row has a rule and a generator of its own, so that a prompt's continuation doesn't depend
    on the other prompts of its batch.

    Args:
        logits: The logits, [b, vocab].
        rules: The rule of each row.
        generators: The random generator of each row, on the CPU; greedy rows don't use theirs.

    Returns:
        The token ids, [b].
    """
    tokens = logits.argmax(dim=-1)
    drawing = {rule for rule in rules if not rule.greedy}
    for rule in drawing:
        pairs = zip(rules, generators, strict=True)
        rows = [row for row, (other, _) in enumerate(pairs) if other == rule]
        probabilities = filtered_probabilities(logits[rows], rule).cpu()
        drawn = [
            torch.multinomial(each, 1, generator=generators[row])
            for row, each in zip(rows, probabilities, strict=True)
        ]
        tokens[rows] = torch.cat(drawn).to(tokens.device)
    return tokens


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the probabilities after temperature, top-k and top-p, in this order.

    Args:
        logits: The logits in any floating type, [b, vocab].
        sampling: The rule.

    Returns:
        The probabilities in fp32, [b, vocab].
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.size(-1):
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p: the first one always does.
        drop = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return logits.softmax(dim=-1)
