"""A block of two linear layers over tensor parallel ranks, with and without MC2."""

from typing import Any

import torch

from tests.support.tiny import TINY, train_config


def block(mc2: bool) -> list[torch.Tensor]:
    """Returns this rank's result, and the gradients of both layers' weights and of the input."""
    from megatron.core import tensor_parallel

    from glm3cli.model.build import transformer_config
    from glm3cli.model.mc2 import GatheringLinear, ScatteringLinear
    from glm3cli.parallel.groups import open_grid

    model = TINY.model_copy(update={"hidden_size": 256, "ffn_hidden_size": 512})
    config = train_config(tp=2, dtype="bf16")
    with open_grid(config) as grid:
        mcore = transformer_config(model, config, "bf16", sequence_parallel=True)
        mcore.gradient_accumulation_fusion = False  # gradients as autograd gives them
        common: dict[str, Any] = {"config": mcore, "init_method": None, "skip_bias_add": False}
        column = GatheringLinear if mc2 else tensor_parallel.ColumnParallelLinear
        row = ScatteringLinear if mc2 else tensor_parallel.RowParallelLinear
        first = column(256, 512, bias=True, gather_output=False, **common)
        second = row(512, 256, bias=False, input_is_parallel=True, **common)
        generator = torch.Generator().manual_seed(grid.rank)
        with torch.no_grad():
            for weight in (first.weight, first.bias, second.weight):
                weight.copy_(torch.randn(weight.shape, generator=generator) / 16)
        hidden = torch.randn(3, 2, 256, generator=generator).bfloat16().requires_grad_()
        result, _ = second(first(hidden)[0])
        result.square().sum().backward()
        grads = [one.grad for one in (first.weight, first.bias, second.weight, hidden)]
        return [result.detach(), *(grad for grad in grads if grad is not None)]
