"""`Totals`: what the micro-batches of a global batch report, added up over all ranks by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Totals:
    """The sum and the count of every value that an objective reports; the same on every rank.

    Attributes:
        by_name: The sum of each value and the sum of the weights of its parts, such as the sum of
            the losses and the number of the trained tokens. The first is `loss`; `tokens` has the
            number of the trained tokens in both places, where they have other weights than 1.
    """

    by_name: Mapping[str, tuple[float, float]]

    @property
    def loss(self) -> float:
        """The sum of the losses."""
        return self.by_name["loss"][0]

    @property
    def weight(self) -> float:
        """The sum of the weights of the losses; 0 if there is nothing to train."""
        return self.by_name["loss"][1]

    @property
    def num_tokens(self) -> int:
        """The number of trained tokens, or of what else the objective trains."""
        return int(self.by_name.get("tokens", (0.0, 0.0))[1] or self.weight)

    @property
    def mean_loss(self) -> float:
        """The weighted mean of the losses; NaN if there is none."""
        return self.loss / self.weight if self.weight else math.nan

    def means(self) -> dict[str, float]:
        """Returns the means of the objective's `metrics`; those without a part are left out."""
        return {
            name: total / count
            for name, (total, count) in self.by_name.items()
            if count and name not in ("loss", "tokens")
        }

    def __add__(self, other: "Totals") -> "Totals":
        """Adds the totals of another global batch of the same objective."""
        return Totals(
            {
                name: (total + other.by_name[name][0], count + other.by_name[name][1])
                for name, (total, count) in self.by_name.items()
            }
        )
