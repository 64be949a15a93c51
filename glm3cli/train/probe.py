"""`Probe`: what looks at the model that trains after each --eval-interval, beside the validation.

The benchmarks of --eval-suite are probes; evals/suites/in_training.py makes them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from glm3cli.config.model import ModelConfig
from glm3cli.data.samples.loader import Loader
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.train.step import TrainStep


class Probe(Protocol):
    """Finds numbers about the model that trains."""

    def look(self, train_step: TrainStep, loader: Loader) -> dict[str, float]:
        """Returns means by name, GROUP/NAME, as an objective reports them; every rank calls it.

        Args:
            train_step: Has the model, which stays as it is.
            loader: A loader of the run, for its micro-batch size and its parallel sizes.
        """


# Makes the probes of a run, whose model and tokenizer it is given.
MakeProbes = Callable[[ModelConfig, Tokenizer, Loader], Sequence[Probe]]


def no_probes(_model: ModelConfig, _tokenizer: Tokenizer, _loader: Loader) -> Sequence[Probe]:
    """Makes none."""
    return ()
