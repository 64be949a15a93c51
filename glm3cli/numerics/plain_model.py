"""`PlainModel`: a whole ChatGLM3 as its formulas have it, in fp64 on the host, with AdamW."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Weight, slots
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.numerics import plain

# A weight's own name, and its layer.
_Key = tuple[str, int | None]


@dataclass
class PlainModel:
    """A model on the host; also a source of weights, in the table's canonical form.

    Attributes:
        model: The shape of the model.
        weights: Every weight in fp64.
        gradients: The gradients of the steps so far, by the weights' keys.
    """

    model: ModelConfig
    weights: dict[_Key, Tensor]
    gradients: dict[_Key, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: WeightSource) -> "PlainModel":
        """Returns a model with the weights of a source."""
        found = {
            (weight.logical, layer): source.read(weight, layer).double()
            for weight, layer in slots(source.model)
        }
        return cls(source.model, found)

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """Returns one weight."""
        return self.weights[weight.logical, layer].detach()

    def logits(self, tokens: Tensor) -> Tensor:
        """Returns the logits after every token of some texts, [b, s] -> [b, s, vocabulary]."""
        model, eps = self.model, self.model.layernorm_epsilon
        hidden = self.weights["embedding", None][tokens].transpose(0, 1)  # [s, b, h]
        for layer in range(model.num_layers):
            normed = plain.rms_norm(hidden, self.weights["input_norm", layer], eps)
            context = self._attend(normed, layer)
            hidden = hidden + context @ self.weights["attention_out", layer].t()
            normed = plain.rms_norm(hidden, self.weights["mlp_norm", layer], eps)
            inner = plain.swiglu(normed @ self.weights["mlp_up", layer].t())
            hidden = hidden + inner @ self.weights["mlp_down", layer].t()
        normed = plain.rms_norm(hidden, self.weights["final_norm", None], eps)
        return (normed @ self.weights["output", None].t()).transpose(0, 1)

    def _attend(self, normed: Tensor, layer: int) -> Tensor:
        """Returns the context of all heads of a layer, [s, b, query]."""
        model, length = self.model, len(normed)
        mixed = normed @ self.weights["qkv_weight", layer].t() + self.weights["qkv_bias", layer]
        sizes = [model.query_size, model.kv_size, model.kv_size]
        query, key, value = (
            part.view(*part.shape[:-1], -1, model.kv_channels)
            for part in torch.split(mixed, sizes, dim=-1)
        )
        half = model.kv_channels // 2
        pairs = torch.arange(0, half, 2, dtype=torch.float64) / half
        angles = torch.outer(torch.arange(length).double(), model.rotary_base**-pairs)
        query, key = (plain.rotate(one, angles[:, None, None]) for one in (query, key))
        seen = plain.causal(torch.arange(length), length)
        return plain.attention(query, key, value, model.kv_channels**-0.5, seen).flatten(2)

    def train(self, config: TrainConfig, tokens: Tensor, labels: Tensor, mask: Tensor) -> "Step":
        """Trains one step with AdamW; weights change in place.

        Args:
            config: The settings of the optimizer; its learning rate is constant.
            tokens: The tokens, [b, s].
            labels: The token that follows each of them, [b, s].
            mask: The weight of each token's loss, [b, s].
        """
        leaves = {key: weight.detach().requires_grad_() for key, weight in self.weights.items()}
        self.weights = leaves
        losses = plain.cross_entropy(self.logits(tokens), labels)
        loss = (losses * mask).sum() / mask.sum()
        torch.autograd.backward(loss)
        found = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
        norm = math.sqrt(sum(float(one.square().sum()) for one in found.values()))
        scale = min(1.0, config.clip_grad / (norm + 1e-6)) if config.clip_grad else 1.0
        for key, gradient in found.items():
            self.gradients.setdefault(key, []).append(gradient * scale)
        self.weights = {key: self._stepped(key, leaf, config) for key, leaf in leaves.items()}
        return Step(float(loss.detach()), norm)

    def _stepped(self, key: _Key, weight: Tensor, config: TrainConfig) -> Tensor:
        """Returns a weight after the newest of its gradients."""
        return plain.adamw_step(
            weight.detach(),
            self.gradients[key],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            decay=config.weight_decay if weight.dim() > 1 else 0.0,
        )

    @torch.no_grad()
    def logprobs(
        self, prompt: Sequence[int], new: Sequence[int]
    ) -> tuple[list[float], list[float]]:
        """Returns the log-probability of each new token after a prompt, and that of the likeliest.

        Args:
            prompt: The token ids of the prompt.
            new: The token ids that follow.
        """
        rows = self.logits(torch.tensor([[*prompt, *new]]))[0, len(prompt) - 1 : -1]
        found = rows.log_softmax(-1)
        own = found.gather(-1, torch.tensor(new).unsqueeze(-1)).squeeze(-1)
        return own.tolist(), found.amax(-1).tolist()


@dataclass(frozen=True)
class Step:
    """What a training step reports.

    Attributes:
        loss: The mean loss of the trained tokens.
        grad_norm: The norm of the gradient before it is clipped.
    """

    loss: float
    grad_norm: float
