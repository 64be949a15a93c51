"""Megatron-core's GPT model, with a loss that costs less.

On one tensor parallel rank a kernel of ours takes fewer passes over the logits. In a tuning, where
answers are trained and prompts are not, the logits of the other tokens aren't computed at all: with
a vocabulary of 65,024 they take more memory than anything else of a micro-batch.
"""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from glm3cli.device import require_active


class ChatGLM(GPTModel):
    """Megatron-core's GPTModel, which computes losses where they are needed."""

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Tensor | None,
        loss_mask: Tensor | None = None,
        **megatron: Any,
    ) -> Tensor:
        """Computes losses of hidden states on the last stage, where GPTModel.forward calls it.

        Args:
            hidden_states: The last layer's output, [s, b, h], or this rank's part of the sequence.
            labels: The right token ids, [b, s]; None asks for logits.
            loss_mask: The places whose losses are needed, as `Batch.needed` has them: megatron-core
                hands its argument of this name on to here and doesn't use it. None needs all.
            megatron: The further arguments of GPTModel.

        Returns:
            The losses in fp32, [b, s], 0 where they aren't needed; before the last stage the hidden
            states, and without labels the logits.
        """
        if loss_mask is None or labels is None or not self.post_process:
            whole: Tensor = super()._postprocess(hidden_states, labels=labels, **megatron)
            return whole
        layer = self.output_layer
        is_shared, needed = layer.sequence_parallel, loss_mask
        if is_shared:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=layer.tp_group
            )
        rows = hidden_states.flatten(0, 1).index_select(0, needed).unsqueeze(1)  # [n, 1, h]
        layer.sequence_parallel = False  # these rows are the same on all of its ranks
        try:
            logits, _ = layer(rows)
        finally:
            layer.sequence_parallel = is_shared
        of_needed = labels.T.flatten().index_select(0, needed).unsqueeze(0)  # [1, n]
        found = self.compute_language_model_loss(of_needed, logits).flatten()
        losses = found.new_zeros(labels.numel()).scatter(0, needed, found)
        return losses.view(labels.T.shape).T.contiguous()

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
