"""Token losses: on one tensor parallel rank in fewer passes than over ranks."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class ChatGLM(GPTModel):
    """Megatron-core's GPTModel; where the vocabulary is whole, with a loss of its own."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of labels [b, s] with logits [s, b, vocabulary]; [b, s] in fp32."""
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        return cross_entropy(logits, labels.T).T.contiguous()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], in fp32; logits [..., vocabulary], labels [...]."""
    return _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    """Keeps the log-probabilities, and turns them into the gradient where they are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(log_probabilities, labels)
        ctx.dtype = logits.dtype
        return -log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        [grad], (log_probabilities, labels) = grads, ctx.saved_tensors
        # The graph is run once, as every schedule of megatron-core does it.
        result = log_probabilities.exp_()
        ones = torch.ones_like(labels, dtype=result.dtype).unsqueeze(-1)
        result.scatter_add_(-1, labels.unsqueeze(-1), -ones)
        return result.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None
