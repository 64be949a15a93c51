"""Megatron-core's GPT model with a loss that takes fewer passes on one tensor parallel rank."""

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from glm3cli.device import require_active


class ChatGLM(GPTModel):
    """Megatron-core's GPTModel; without tensor parallelism our kernel computes its loss."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Computes the cross-entropy of every token.

        Args:
            labels: The right token ids, [b, s].
            logits: The logits, [s, b, vocabulary or this rank's part of it].

        Returns:
            The losses in fp32, [b, s].
        """
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        return require_active().kernels.cross_entropy(logits, labels.T).T.contiguous()
