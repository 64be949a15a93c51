"""From logits to a token: pure functions."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        greedy: Take the likeliest token; the rest is not looked at.
        top_k: Draw among so many likeliest tokens; 0 for all.
        top_p: Draw among the likeliest tokens that together have this probability.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """One token per row: [b, vocab] -> [b].

    Every row draws from its own generator, so that a prompt's text doesn't depend on its batch.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    probabilities = filtered_probabilities(logits, sampling).cpu()
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn).to(logits.device)


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, top-k, and top-p, in this order; [b, vocab] fp32."""
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
