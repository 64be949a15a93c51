"""ChatGLM3 through its whole life: convert, preprocess, pretrain, finetune, generate, eval.

The commands are the main way in (`glm3 --help`). Programs open a model in any layout and use it:

    import glm3cli

    with glm3cli.open_model("RUN") as model:
        [found] = model.generate("What is a lake?", answer=True)

Importing this package imports nothing heavy; opening a model does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glm3cli.version import __version__

if TYPE_CHECKING:
    from glm3cli.infer.model import Model

__all__ = ["__version__", "open_model"]


def open_model(
    path: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto",
    tokenizer: str | Path | None = None,
    lora: str | Path | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    without_kernel: Sequence[str] = (),
) -> "Model":
    """Opens a model for generation and scoring.

    On more than one rank, start the program with torchrun; every rank then calls this and the
    methods of the model alike.

    Args:
        path: A model folder in any layout, or the folder of a training run.
        tp: The tensor parallel size.
        pp: The pipeline parallel size.
        dtype: The type to run in; the model's unless given, but fp32 on a CPU.
        device: The kind of chip; `auto` is an NPU if there is one, else a GPU, else the CPU.
        tokenizer: A folder with a tokenizer.model, or that file; the one beside the model unless
            given.
        lora: A LoRA adapter to compute with: a folder in PEFT's layout, or a run or checkpoint that
            trained it.
        quantize: The type that weights are rounded to when they are loaded; None for none.
        without_kernel: The operations that plain torch computes instead of the chip's kernels, as
            `--without-kernel` names them.

    Returns:
        The model, a context manager; `close` it when it isn't needed any more. One can be open at
        a time.

    Raises:
        glm3cli.errors.Glm3Error: The model can't be read, or doesn't fit these ranks or this
            device; the message says what is wrong, and `hint` what to do.
    """
    from glm3cli.config.inference import InferenceConfig
    from glm3cli.infer.opening import open_here

    settings = {"model": Path(path), "tp": tp, "pp": pp, "dtype": dtype, "device": device}
    settings |= {"quantize": quantize, "without_kernel": list(without_kernel)}
    places = {"tokenizer": tokenizer, "lora": lora}
    settings |= {name: Path(place) for name, place in places.items() if place is not None}
    model = open_here(InferenceConfig.parse(settings))
    assert model is not None  # nproc isn't set
    return model
