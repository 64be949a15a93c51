"""The floating-point operations of training, for TFLOP/s and MFU, by both usual conventions.

`full` counts attention as if every token saw every other (PaLM, appendix B; MosaicML):
6N + 12*L*h*s per token. `causal` counts half of the attention, since a token sees only those before
it (Megatron-LM). Weights that aren't trained have no gradient to compute, and take 4 operations
instead of 6. MFU, model FLOPs utilisation, is the share of the device's peak; that of a run is
higher by `full`, so only numbers of the same convention compare.
"""

from dataclasses import dataclass
from typing import Literal

from glm3cli.config.model import ModelConfig

Convention = Literal["full", "causal"]


def flops_per_token(
    model: ModelConfig, seq_length: float, convention: Convention = "full", frozen: int = 0
) -> float:
    """Returns the operations per trained token, forward and backward, without recomputation.

    They are 6N for the matrix products, where N is the number of their weights (the embedding,
    a look-up, has none), and 12*L*h*s, or half of it, for the attention of L layers whose query
    heads have h elements together, over s tokens.

    Args:
        model: The model's shape.
        seq_length: The number of tokens of a sample. For samples of different lengths it is the
            sum of their squares over the sum of the lengths: the mean over all tokens.
        convention: Whether attention counts whole or by half.
        frozen: The number of weights, the embedding's not among them, that aren't trained: their
            gradients take 2 of the 6 operations.
    """
    matrices = model.num_parameters - model.padded_vocab_size * model.hidden_size
    attention = 12.0 * model.num_layers * model.query_size * seq_length
    return 6.0 * matrices - 2.0 * frozen + (attention if convention == "full" else attention / 2)


@dataclass(frozen=True)
class Utilisation:
    """Turns a device's tokens per second into TFLOP/s and MFU.

    Attributes:
        model: The model's shape.
        seq_length: The largest number of tokens of a sample.
        peak_tflops: The peak of one device in TFLOP/s; None where it isn't known.
        chip: The device's name.
        frozen: The number of weights that aren't trained, as `flops_per_token` takes it.
    """

    model: ModelConfig
    seq_length: int
    peak_tflops: float | None
    chip: str
    frozen: int = 0

    def of_rate(
        self, tokens_per_second: float, seq_length: float | None = None
    ) -> dict[str, float | None]:
        """Returns TFLOP/s and MFU at a rate, by their names in a step's line of metrics.jsonl.

        The names without a convention, `tflops_per_device` and `mfu`, are those by `full`.

        Args:
            tokens_per_second: The tokens per second of one device, padding among them.
            seq_length: The number of tokens of a sample, as `flops_per_token` takes it; None if it
                is the largest one.
        """
        full, causal = (tokens_per_second * flops / 1e12 for flops in self._per_token(seq_length))
        peak = self.peak_tflops
        return {
            "tflops_per_device": full,
            "tflops_per_device_causal": causal,
            "mfu": None if peak is None else full / peak,
            "mfu_causal": None if peak is None else causal / peak,
        }

    def _per_token(self, seq_length: float | None) -> tuple[float, float]:
        """Returns the operations of a token by the conventions `full` and `causal`."""
        length = self.seq_length if seq_length is None else seq_length
        return (
            flops_per_token(self.model, length, "full", self.frozen),
            flops_per_token(self.model, length, "causal", self.frozen),
        )

    def describe(self) -> str:
        """Returns a line of text with the formulas, the operations per token, and the peak."""
        peak = (
            f"unknown for {self.chip} (give --peak-tflops)"
            if self.peak_tflops is None
            else f"{self.peak_tflops:g} TFLOP/s ({self.chip})"
        )
        full, causal = self._per_token(None)
        products = "6N - 2*frozen" if self.frozen else "6N"
        return (
            f"FLOPs per token: full {products} + 12*L*h*s = {full:.4e} (TFLOP/s and MFU go by it), "
            f"causal {products} + 6*L*h*s = {causal:.4e} | peak {peak}"
        )
