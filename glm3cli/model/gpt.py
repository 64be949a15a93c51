"""Token losses: on one tensor parallel rank in fewer passes than over ranks."""

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from glm3cli.device import require_active


class ChatGLM(GPTModel):
    """Megatron-core's GPTModel; where the vocabulary is whole, with a loss of its own."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of labels [b, s] with logits [s, b, vocabulary]; [b, s] in fp32."""
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        return require_active().kernels.cross_entropy(logits, labels.T).T.contiguous()
