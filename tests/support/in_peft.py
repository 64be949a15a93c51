"""What a user of PEFT gets from an adapter; run as a program, in which nothing is ours."""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, merged: str) -> None:
    """Prints how far a model with an adapter is from the model that it was merged into."""
    logits = []
    tokens = torch.arange(9).unsqueeze(0)
    for folder, is_base in ((base, True), (merged, False)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        with torch.no_grad():
            if is_base:
                logits.append(model(tokens).logits)
                model = PeftModel.from_pretrained(model, adapter)
            logits.append(model.eval()(tokens).logits)
    plain, adapted, expected = logits
    found = {"change": (adapted - plain), "difference": (adapted - expected)}
    print(json.dumps({name: float(value.abs().max()) for name, value in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
