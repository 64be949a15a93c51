"""Which weights of a run are trained: checked against a model, and made known to autograd."""

from functools import partial
from typing import TYPE_CHECKING, Any

from glm3cli.checkpoint.names import slots, weight_of
from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from glm3cli.model.gpt import ChatGLM

_SHOWN = 4


def check_selection(config: TrainConfig, model: ModelConfig) -> None:
    """Checks that --train-only and --freeze name weights, and leave some to train.

    Raises:
        ConfigError: They match no weight, or leave none to train.
    """
    if not config.is_partial:
        return
    names = [weight.name("chatglm", layer) for weight, layer in slots(model)]
    trained = [name for name in names if config.selects(name)]
    flag, pattern = "--train-only", config.train_only
    if pattern is None:
        flag, pattern = "--freeze", config.freeze
    if trained and len(trained) < len(names):
        return
    matched = bool(trained) == (flag == "--train-only")
    what = f"{flag} {pattern} matches {'every' if matched else 'no'} weight"
    shown = ", ".join(names[1 : 1 + _SHOWN])
    raise ConfigError(what, f"the weights have names such as {names[0]}, {shown}")


def freeze(gpt: "ChatGLM", config: TrainConfig) -> None:
    """Excludes the weights that don't train from autograd; DDP makes no buffers for them.

    Args:
        gpt: A model chunk.
        config: The settings of the run.
    """
    from glm3cli.model.adapters import is_adapter

    for name, parameter in gpt.named_parameters():
        is_trained = is_adapter(name) or config.trains(_name(gpt, name))
        parameter.requires_grad_(is_trained)
    for layer in gpt.decoder.layers:
        _add_bias_apart(layer.self_attention.linear_qkv)
    if gpt.pre_process and not gpt.embedding.word_embeddings.weight.requires_grad:
        trains = any(parameter.requires_grad for parameter in gpt.parameters())
        if trains and config.recompute == "full":
            # The output of layers that are recomputed has a gradient only if their input has one
            # (tensor_parallel/random.py of megatron-core 0.16.1, CheckpointFunction).
            gpt.embedding.register_forward_hook(_require_grad)
        elif not trains and not gpt.post_process:
            # The next stage sends a gradient back, which has to go somewhere.
            gpt.decoder.register_forward_hook(_end_gradient)


def _name(gpt: "ChatGLM", name: str) -> str:
    """Returns the name in the chatglm layout of a parameter of a model chunk."""
    weight, local = weight_of(name)
    layer = None if local is None else int(gpt.decoder.layers[local].layer_number) - 1
    return weight.name("chatglm", layer)


def _require_grad(_embedding: Any, _args: Any, hidden: "Tensor") -> None:
    """Makes the embedded tokens have a gradient; a hook of the embedding."""
    hidden.requires_grad_()


def _end_gradient(_block: Any, _args: Any, hidden: "Tensor") -> "Tensor":
    """Gives hidden states a gradient that goes no further; a hook of a block of layers."""
    return hidden.detach().requires_grad_().clone()


def _add_bias_apart(linear: Any) -> None:
    """Makes a layer whose bias alone is trained add it after its product.

    Megatron-core's product with a frozen weight has no gradient for the bias
    (tensor_parallel/layers.py 0.16.1, LinearWithFrozenWeight).
    """
    if linear.bias is not None and linear.bias.requires_grad and not linear.weight.requires_grad:
        linear._forward_impl = partial(_biased, linear._forward_impl)


def _biased(multiply: Any, *args: Any, bias: "Tensor", **megatron: Any) -> "Tensor":
    """Returns what a layer multiplies without its bias, and the bias added to it."""
    product: Tensor = multiply(*args, bias=None, **megatron)
    return product + bias
