"""Loads a folder as a user of transformers does; a program that imports nothing of glm3."""

import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(folder: str, logits: str | None = None) -> None:
    """Prints as JSON what transformers makes of a model.

    Args:
        folder: The folder of the model.
        logits: A file with prompts, golden logits and golden tokens to compare with; may be None.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **({"dtype": torch.float32} if logits else {}),
    )
    print(
        json.dumps(
            {
                "class": f"{type(model).__module__}.{type(model).__name__}",
                "problems": sorted(name for name in report if report[name]),
                "dtype": str(model.dtype),
                "eos": [model.config.eos_token_id, model.generation_config.eos_token_id],
                "pad": [model.config.pad_token_id, model.generation_config.pad_token_id],
                "rope": model.config.rope_parameters,
                "golden": {} if logits is None else against(model.eval(), load_file(logits)),
            }
        )
    )


def against(model, golden: dict[str, torch.Tensor]) -> dict[str, tuple[float, bool]]:
    """Returns for each case the largest difference of logits, and if greedy tokens are equal."""
    found = {}
    model.generation_config.eos_token_id = None  # golden tokens go on over the end
    for case in ("len7", "len33", "len128"):
        ids = golden[f"{case}.input_ids"]
        with torch.no_grad():
            difference = (model(ids).logits - golden[f"{case}.logits"]).abs().max()
            tokens = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
            )
        equal = tokens[:, ids.size(1) :].tolist() == golden[f"{case}.greedy16"].tolist()
        found[case] = float(difference), equal
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
