"""Draws tokens from logits: temperature, top-k, top-p and min-p, as transformers defines them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.config.inference import COLDEST
from glm3cli.errors import ConfigError

# Of tokens that are exactly as likely as the last of top-k, so many more are kept, too.
_TIES = 32
# So many of the likeliest tokens are looked at before all are sorted.
_FIRST = 1024
# As many token ids are drawn from together: about the root of the vocabulary's size.
_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """The rule by which a token is drawn.

    The attributes down to `logit_bias` change the logits, of greedy decoding, too. Those from
    `temperature` to `min_p` choose among which tokens is drawn, in this order; they don't count if
    `greedy` is set. The penalties and the forbidden n-grams see the prompt and the new tokens,
    `presence_penalty` and `frequency_penalty` the new tokens alone.

    Attributes:
        greedy: Whether to take the likeliest token.
        temperature: The divisor of the logits, at least `COLDEST`.
        top_k: The number of likeliest tokens among which is drawn; 0 draws among all.
        top_p: The probability that the likeliest tokens, among which is drawn, have together; 1
            draws among all.
        min_p: Tokens are dropped that are less likely than the likeliest one times this.
        repetition_penalty: The divisor of the positive logits, and factor on the negative ones, of
            tokens that were there before (Keskar et al. 2019); 1 changes nothing.
        presence_penalty: What is taken from the logits of new tokens that were there before.
        frequency_penalty: What is taken from a token's logit for each time it was there before.
        no_repeat_ngram_size: No run of so many tokens comes twice; 0 forbids none.
        logit_bias: What is added to the logits of some tokens, as pairs of token id and number.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

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

    @property
    def changes_logits(self) -> bool:
        """Whether the rule changes logits before the choice, be it greedy or not."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
            or self.logit_bias
        )


def sample(
    logits: Tensor, rules: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> Tensor:
    """Draws a token for each row, or takes the likeliest one.

    Every row has a rule and a generator of its own, so that a prompt's continuation doesn't depend
    on the other prompts of its batch. A generator gives the noise on the CPU, so that the same seed
    draws the same tokens on every device.

    Args:
        logits: The logits, [b, vocab].
        rules: The rule of each row.
        generators: The random generator of each row, on the CPU; greedy rows don't use theirs.

    Returns:
        The token ids, [b].
    """
    tokens = logits.argmax(dim=-1)
    for rule in {rule for rule in rules if not rule.greedy}:
        pairs = zip(rules, generators, strict=True)
        rows = [row for row, (other, _) in enumerate(pairs) if other == rule]
        scores, ids = candidates(logits[rows], rule)
        whole = torch.full_like(logits[rows], -torch.inf, dtype=scores.dtype)
        tokens[rows] = _draw(whole.scatter_(1, ids, scores), [generators[row] for row in rows])
    return tokens


def candidates(logits: Tensor, sampling: Sampling, keep: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the tokens among which is drawn, the likeliest first.

    Args:
        logits: The logits in any floating type, [b, vocab].
        sampling: The rule.
        keep: The number of tokens that top-k, top-p and min-p always leave.

    Returns:
        The logits after temperature in fp32, minus infinity for a token that isn't drawn, and the
        token ids; [b, count] each.
    """
    logits = logits.float() / sampling.temperature
    count = logits.size(-1)
    top_k = max(sampling.top_k, keep) if sampling.top_k else 0
    if 0 < top_k < count:
        count = min(count, top_k + _TIES)
    elif sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return logits, torch.arange(count, device=logits.device).expand_as(logits)
    elif keep <= _FIRST < count and _are_enough(logits, sampling):
        count = _FIRST
    scores, ids = logits.topk(count, dim=-1)
    always = torch.arange(count, device=logits.device) < keep
    if 0 < top_k < count:
        drop = scores < scores[:, top_k - 1 : top_k]
        scores = scores.masked_fill(drop, -torch.inf)
    if sampling.top_p < 1.0:
        whole = scores if top_k else logits
        shares = (scores - whole.logsumexp(dim=-1, keepdim=True)).exp()
        # A token stays while the mass before it is below top_p: the first one always does.
        drop = (shares.cumsum(dim=-1) - shares >= sampling.top_p) & ~always
        scores = scores.masked_fill(drop, -torch.inf)
    if sampling.min_p > 0.0:
        shares = scores.softmax(dim=-1)
        drop = (shares < sampling.min_p * shares[:, :1]) & ~always
        scores = scores.masked_fill(drop, -torch.inf)
    return scores, ids


def _are_enough(logits: Tensor, sampling: Sampling) -> bool:
    """Returns whether top-p or min-p leaves none but the `_FIRST` likeliest tokens of each row.

    Only a CPU looks: a device would have to wait for the answer, and sorts faster than that.
    """
    if logits.device.type != "cpu":
        return False
    first = logits.topk(_FIRST, dim=-1).values
    mass = (first.logsumexp(dim=-1) - logits.logsumexp(dim=-1)).exp()
    least = (first[:, -1] - first[:, 0]).exp()
    # A thousandth more, so that no rounding of sums matters.
    return bool(((mass > sampling.top_p + 1e-3) | (least < 0.999 * sampling.min_p)).all())


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the probability with which each token is drawn.

    Args:
        logits: The logits in any floating type, [b, vocab].
        sampling: The rule.

    Returns:
        The probabilities in fp32, [b, vocab].
    """
    scores, ids = candidates(logits, sampling)
    result = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    return result.scatter_(-1, ids, scores.softmax(dim=-1))


def _draw(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws a token of each row, first its block of token ids and then its place within.

    The largest sum of a log-probability and Gumbel noise is a draw by the probabilities (Maddison
    et al. 2014, "A* sampling"). The noise belongs to the token ids, so that logits which differ by
    a rounding, as those of another batch or layout do, draw another token only where the two
    largest sums are as near to each other as that. Blocks need a number for each of them and for
    each of their places, instead of one for each token id.

    Args:
        scores: The logits, minus infinity for a token that isn't drawn, [b, vocab].
        generators: The random generator of each row, on the CPU.

    Returns:
        The token ids, [b].
    """
    rest = -scores.size(1) % _BLOCK
    padded = torch.nn.functional.pad(scores, (0, rest), value=-torch.inf)
    blocks = padded.view(len(scores), -1, _BLOCK)
    totals = blocks.logsumexp(dim=-1)
    count = _BLOCK + totals.size(1)
    uniform = torch.stack(
        [torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators]
    )
    noise = -(-uniform.log()).log().float().to(scores.device)
    block = (totals + noise[:, _BLOCK:]).argmax(dim=-1)
    inside = blocks[torch.arange(len(blocks), device=block.device), block]
    return block * _BLOCK + (inside + noise[:, :_BLOCK]).argmax(dim=-1)
