"""`Weighting`: how much each token of a sample weighs in the loss."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from glm3cli.data.tokens.messages import IGNORED_LABEL


@dataclass(frozen=True)
class Weighting:
    """The weight of each token in the loss of a global batch.

    The loss is the sum of the weighted losses of all tokens over the sum of the weights.

    Attributes:
        average: `token` gives every trained token the weight of its sample; `sample` shares the
            weight of a sample among its trained tokens, so that the loss is the mean of the
            samples' means.
        last_turn_only: Whether the last answer of a sample is trained alone. Answers that follow
            each other without another's turn in between count as one.
    """

    average: Literal["token", "sample"] = "token"
    last_turn_only: bool = False

    def of(
        self, labels: np.ndarray, segment_ids: np.ndarray, weights: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the weights of tokens.

        Args:
            labels: The id that each position is to predict, IGNORED_LABEL for none, [s].
            segment_ids: The sample that each position belongs to, in increasing order, [s].
            weights: The weight of each sample, in the order of the segment ids; None for 1 each.

        Returns:
            0 for positions that aren't trained; float32 [s].
        """
        trained = labels != IGNORED_LABEL
        if self.average == "token" and not self.last_turn_only and weights is None:
            return trained.astype(np.float32)
        found = np.zeros(len(labels), dtype=np.float32)
        for number, segment in enumerate(np.unique(segment_ids)):
            places = np.flatnonzero(trained & (segment_ids == segment))
            if self.last_turn_only and len(places):
                # The last run of neighbouring positions.
                gaps = np.flatnonzero(np.diff(places) > 1)
                places = places[gaps[-1] + 1 :] if len(gaps) else places
            weight = 1.0 if weights is None else float(weights[number])
            if self.average == "sample" and len(places):
                weight /= len(places)
            found[places] = weight
        return found
