"""From logits to a token: pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The rule by which a token is drawn.

    Attributes:
        greedy: Take the likeliest token; the other attributes are then not looked at.
        temperature: The divisor of the logits.
        top_k: Draw among this many likeliest tokens; 0 draws among all.
        top_p: Draw among the likeliest tokens that together have this probability.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample(
    logits: Tensor, rules: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> Tensor:
    """Draws one token per row: [b, vocab] -> [b].

    Every row has a rule and a generator of its own, so that a prompt's text doesn't depend on its
    batch.
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

    [b, vocab] logits of any floating type -> [b, vocab] probabilities in fp32.
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
