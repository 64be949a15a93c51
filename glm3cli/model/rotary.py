"""Rotary positions for megatron-core's attention, per row where the rows of a batch differ."""

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from glm3cli.model.attention import Window


class Rotary(RotaryEmbedding):
    """Megatron-core's rotary embedding; while `window` is set, it follows cached decoding.

    ChatGLM3 rotates interleaved pairs of the first half of each head.
    """

    window: Window | None = None

    def forward(self, max_seq_len: int, **megatron: Any) -> Tensor:
        """Angles of the present pass, [s, b or 1, 1, d/2]."""
        if self.window is None:
            return super().forward(max_seq_len, **megatron)
        positions = self.window.positions(max_seq_len)  # [b, s]
        frequencies = self.inv_freq.to(positions.device)
        angles = positions.T.unsqueeze(-1).to(frequencies.dtype) * frequencies  # [s, b, d/4]
        return angles.repeat_interleave(2, dim=-1).unsqueeze(2)


def use_rotary(model: Any, rotary_base: float) -> None:
    """Gives a GPTModel our rotary embedding in place of its own."""
    old = model.rotary_pos_emb
    model.rotary_pos_emb = Rotary(
        kv_channels=model.config.kv_channels,
        rotary_percent=0.5,
        rotary_interleaved=True,
        rotary_base=rotary_base,
        use_cpu_initialization=True,
        cp_group=old.cp_group,
    )
