"""What changes logits before a token is chosen: bias, penalties, and forbidden n-grams.

Each is what transformers' logits processor of that name does (generation/logits_process.py), in the
order of its generate; the presence and frequency penalties, which it lacks, are those of OpenAI's
API.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from glm3cli.infer.sampling import Sampling


def penalize(logits: Tensor, rule: Sampling, prompt: Sequence[int], new: Sequence[int]) -> None:
    """Changes the logits of one token in place.

    Args:
        logits: The logits of the token that comes next, [vocab].
        rule: The rule of the request.
        prompt: The token ids of the prompt.
        new: The new token ids so far.
    """
    if rule.logit_bias:
        ids, biases = zip(*rule.logit_bias, strict=True)
        logits[_ids(ids, logits)] += torch.tensor(biases, device=logits.device)
    if rule.repetition_penalty != 1.0:
        seen = _ids(sorted({*prompt, *new}), logits)
        scores, penalty = logits[seen], rule.repetition_penalty
        logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if rule.no_repeat_ngram_size:
        banned = forbidden(rule.no_repeat_ngram_size, [*prompt, *new])
        logits[_ids(banned, logits)] = -torch.inf
    if (rule.presence_penalty or rule.frequency_penalty) and new:
        counts = Counter(new)
        amounts = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        seen = _ids(list(counts), logits)
        logits[seen] -= rule.presence_penalty + rule.frequency_penalty * amounts


def forbidden(size: int, tokens: Sequence[int]) -> list[int]:
    """Returns the tokens after which the last `size` tokens would have been there before."""
    if len(tokens) < size:
        return []
    last = list(tokens[len(tokens) - size + 1 :])
    starts = range(len(tokens) - size + 1)
    found = {tokens[i + size - 1] for i in starts if list(tokens[i : i + size - 1]) == last}
    return sorted(found)


def _ids(tokens: Sequence[int], logits: Tensor) -> Tensor:
    """Returns token ids as an index on the device of the logits."""
    return torch.tensor(list(tokens), dtype=torch.long, device=logits.device)
