"""Steps of the command against transformers and torch's own AdamW."""

from pathlib import Path

import pytest
import torch

from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.data.kinds import TEXT
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.datasets import build_samples
from glm3cli.data.samples.spec import DataSpec
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.demo import content
from tests.support import reference
from tests.support.checkpoints import read_all
from tests.support.project import Project, steps
from tests.support.train_command import options, succeed

LR, BETAS, EPS, DECAY, CLIP = 1e-2, (0.8, 0.9), 1e-4, 0.3, 0.5
STEPS, BATCH, LENGTH = 4, 4, 16


def test_steps_are_those_of_transformers_and_torch(project: Project, tmp_path: Path) -> None:
    """Decoupled weight decay spares norms and biases; the gradient is that of the mean loss."""
    changes = {
        "train_iters": STEPS,
        "lr": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_eps": EPS,
        "weight_decay": DECAY,
        "clip_grad": CLIP,
        "save_interval": 2,
    }
    succeed(*options(project, tmp_path / "run", **changes))
    resumed = {**changes, "resume": tmp_path / "run/iter_0000002"}
    succeed(*options(project, tmp_path / "again", **resumed))

    source = open_source(project.model)
    native = reference.build(content.MODEL, source)
    parameters = list(native.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    tokenizer = Tokenizer.load(project.model)
    spec = DataSpec(Blend((str(project.text),), None), "949,50,1", LENGTH, 1234, STEPS * BATCH, 0)
    samples, _ = build_samples(TEXT, spec, tokenizer)
    found, norms = [], []
    for step in range(STEPS):
        batch = [samples[step * BATCH + row] for row in range(BATCH)]
        tokens, labels = (
            torch.stack([torch.as_tensor(one[key]) for one in batch])
            for key in ("tokens", "labels")
        )
        logits = native(tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        found.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
    assert min(norms) > 2 * CLIP  # so that clipping has an effect
    ours = steps(tmp_path / "run")
    assert [one["loss"] for one in ours] == pytest.approx(found, rel=1e-5)
    assert [one["grad_norm"] for one in ours] == pytest.approx(norms, rel=1e-4)
    assert [one["loss"] for one in steps(tmp_path / "again")] == pytest.approx(found[2:], rel=1e-5)

    by_name = dict(native.named_parameters())
    for run in ("run", "again"):
        trained = read_all(tmp_path / run)
        for weight, layer in reference.all_slots(content.MODEL):
            name = weight.name("chatglm", layer)
            theirs = torch.cat([by_name[part] for part in reference.names(weight, layer)])
            changed = (theirs - source.read(weight, layer)).norm()
            assert (trained[name] - theirs).norm() < 1e-3 * changed, name
