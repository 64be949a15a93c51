"""Floating-point operations of training, for TFLOP/s and MFU, by both usual conventions.

`full` counts attention as if every token saw every other (PaLM, appendix B; MosaicML):
6N + 12*L*h*s per token. `causal` halves the attention, since a token sees only those before it
(Megatron-LM). The same run has a higher MFU by `full`; numbers compare within a convention only.
"""

from dataclasses import dataclass
from typing import Literal

from glm3cli.config.model import ModelConfig

Convention = Literal["full", "causal"]


def flops_per_token(model: ModelConfig, seq_length: int, convention: Convention = "full") -> float:
    """Operations per trained token, forward and backward, without recomputation.

    N is the weights of the matrix products (the embedding is a look-up), h the size of all query
    heads.
    """
    matrices = model.num_parameters - model.padded_vocab_size * model.hidden_size
    attention = 12.0 * model.num_layers * model.query_size * seq_length
    return 6.0 * matrices + (attention if convention == "full" else attention / 2)


@dataclass(frozen=True)
class Utilisation:
    """Makes TFLOP/s and MFU of a device's tokens per second.

    Attributes:
        full: Operations per token by the convention `full`.
        causal: The same by `causal`.
        peak_tflops: Of one device, or None where it isn't known.
        chip: The device's name.
    """

    full: float
    causal: float
    peak_tflops: float | None
    chip: str

    @classmethod
    def of(
        cls, model: ModelConfig, seq_length: int, peak_tflops: float | None, chip: str
    ) -> "Utilisation":
        """That of a model and a device."""
        full, causal = (flops_per_token(model, seq_length, name) for name in ("full", "causal"))
        return cls(full, causal, peak_tflops, chip)

    def of_rate(self, tokens_per_second: float) -> dict[str, float | None]:
        """The fields of a step's record; the unnamed ones go by `full`."""
        full, causal = (tokens_per_second * flops / 1e12 for flops in (self.full, self.causal))
        peak = self.peak_tflops
        return {
            "tflops_per_device": full,
            "tflops_per_device_causal": causal,
            "mfu": None if peak is None else full / peak,
            "mfu_causal": None if peak is None else causal / peak,
        }

    def describe(self) -> str:
        """The formula, the conventions, and the peak, as a line of text."""
        peak = (
            f"unknown for {self.chip} (give --peak-tflops)"
            if self.peak_tflops is None
            else f"{self.peak_tflops:g} TFLOP/s ({self.chip})"
        )
        return (
            f"FLOPs per token: full 6N + 12*L*h*s = {self.full:.4e} (TFLOP/s and MFU go by it), "
            f"causal 6N + 6*L*h*s = {self.causal:.4e} | peak {peak}"
        )
