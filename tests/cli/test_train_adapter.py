"""`glm3 finetune --lora-rank`: what a run leaves, what it is good for, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import glm3cli
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.config.training import FinetuneConfig
from glm3cli.train.origin import Origin
from tests.support.adapters import adapter_tensors, write_adapter
from tests.support.checkpoints import assert_same
from tests.support.project import Project, call, steps
from tests.support.train_command import checkpoints, losses, options, succeed
from tests.support.weights import weights_of

LORA = {"lora_rank": 4, "lora_alpha": 12, "lr": 1e-2}


@pytest.fixture(scope="module")
def run(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    succeed(*options(project, folder, "finetune", **LORA))
    return folder


def test_what_a_run_leaves(run: Path, project: Project) -> None:
    assert checkpoints(run) == ["iter_0000003", "iter_0000006"]
    folder = run / "iter_0000006" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)
    assert config["base_model_name_or_path"] == str(project.model)
    assert config["target_modules"] == [
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ]
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 4 * 2
    assert steps(run)[-1]["loss"] < steps(run)[0]["loss"]
    assert yaml.safe_load((run / "run.yaml").read_text())["lora_rank"] == 4


def test_a_run_is_its_base_model_with_the_adapter_merged(
    run: Path, project: Project, tmp_path: Path
) -> None:
    succeed("convert", "mg2hf", project.model, tmp_path / "merged", "--lora", run)
    found, merged = (weights_of(open_source(path)) for path in (run, tmp_path / "merged"))
    assert_same(found, merged)
    base = weights_of(open_source(project.model))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == 2 * 4
    succeed("convert", "mg2hf", run, tmp_path / "from_run")
    assert_same(weights_of(open_source(tmp_path / "from_run")), merged)
    shown = json.loads(succeed("convert", "inspect", run, "--json").out)
    assert shown["adapters"] == [str(run / "iter_0000006" / "adapter")]


def test_generation_computes_with_the_adapter(run: Path, project: Project, tmp_path: Path) -> None:
    succeed("convert", "mg2hf", project.model, tmp_path / "merged", "--lora", run)
    words = ("--prompt", "The lake is", "--greedy", "--max-new-tokens", 8, "--json", "--logprobs")
    found = [
        json.loads(succeed("generate", *model, *words, "--device", "cpu").out)["results"][0]
        for model in (
            ("--model", tmp_path / "merged"),
            ("--model", project.model, "--lora", run),
            ("--model", project.model, "--lora", run / "iter_0000006"),
            ("--model", run),
            ("--model", project.model),
        )
    ]
    merged, *others, base = found
    for other in others:
        assert other["token_ids"] == merged["token_ids"]
        assert other["logprobs"] == pytest.approx(merged["logprobs"], abs=1e-5)
    assert base["logprobs"] != pytest.approx(merged["logprobs"], abs=1e-3)
    with glm3cli.open_model(project.model, lora=run, device="cpu") as model:
        [again] = model.generate("The lake is", max_new_tokens=8)
    assert again.token_ids == merged["token_ids"]


def test_a_run_without_its_base_model_is_a_sentence(
    run: Path, project: Project, tmp_path: Path
) -> None:
    copy = shutil.copytree(run / "iter_0000006", tmp_path / "iter_0000006")
    file = copy / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(project.model), str(tmp_path / "gone")))
    ended = call("convert", "mg2hf", copy, tmp_path / "new")
    assert ended.code == 3
    assert f"is an adapter for {tmp_path / 'gone'}" in " ".join(ended.err.split())


def test_it_goes_on_where_it_was(run: Path, project: Project, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "iter_0000006")
    succeed(*options(project, folder, "finetune", **LORA))
    assert losses(folder)[-3:] == losses(run)[-3:]
    found, expected = (
        load_file(place / "iter_0000006/adapter/adapter_model.safetensors")
        for place in (folder, run)
    )
    assert_same(found, expected)


def test_a_new_run_starts_from_an_adapter(run: Path, project: Project, tmp_path: Path) -> None:
    saved = tmp_path / "run"
    changes = {"lora_rank": None, "lora_alpha": None, "adapter": run}
    ended = succeed(*options(project, saved, "finetune", **LORA | changes, train_iters=1))
    assert "resume" not in ended.err
    # The first batch again, with what six steps have learned.
    assert losses(saved)[0] < losses(run)[0] - 0.01
    config = json.loads((saved / "iter_0000001/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)


def test_an_adapter_of_some_modules_and_ranks_is_the_same_after_a_step_of_nothing(
    project: Project, tmp_path: Path
) -> None:
    from glm3cli.checkpoint.adapter.reader import open_adapter
    from glm3cli.demo.content import MODEL

    tensors = adapter_tensors(
        "self_attention.dense", "mlp.dense_4h_to_h", model=MODEL, ranks={"self_attention.dense": 5}
    )
    tensors = {n: t * 0.01 for n, t in tensors.items() if "layers.0" in n or "dense_4h" in n}
    adapter = write_adapter(
        tmp_path / "adapter",
        tensors,
        target_modules=["dense", "dense_4h_to_h"],
        layers_to_transform=[0, 1],
        rank_pattern={"dense": 5},
    )
    changes = {"adapter": adapter, "lr": 1e-30, "weight_decay": 0, "train_iters": 1}
    succeed(*options(project, tmp_path / "run", "finetune", **changes))
    found, expected = (
        open_adapter(place, MODEL)
        for place in (tmp_path / "run" / "iter_0000001" / "adapter", adapter)
    )
    assert found.pairs.keys() == expected.pairs.keys()
    for slot, [pair] in expected.pairs.items():
        zero = torch.zeros(slot[0].shape(MODEL))
        merged = [source.merge(*slot, zero) for source in (found, expected)]
        assert torch.allclose(*merged, atol=1e-6)
        assert found.pairs[slot][0].a.size(0) == pair.a.size(0)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"lora_rank": 0}, 2, "--lora-rank 0: should be greater than or equal to 1"),
        ({"lora_rank": 4, "lora_target": "qkv,mlp"}, 2, "mlp is none of them"),
        ({"lora_alpha": 4}, 2, "--lora-alpha goes with --lora-rank or --adapter"),
        ({"lora_rank": 4, "lora_alpha": 1e308}, 2, "should be less than or equal to 1000000"),
        (
            {
                "lora_rank": 4,
                "from_scratch": True,
                "model_config": "tiny",
                "model": None,
                "tokenizer": "{tokenizer}",
            },
            2,
            "an adapter is trained for a model",
        ),
        ({"adapter": "{text}"}, 3, "has no adapter_config.json"),
        ({"adapter": "{run}", "lora_rank": 5}, 2, "--lora-rank 5, but the adapter"),
        ({"adapter": "{other}"}, 3, "the model has 2 layers"),
    ],
    ids=str,
)
def test_what_is_refused(
    run: Path, project: Project, tmp_path: Path, changes: dict, code: int, words: str
) -> None:
    write_adapter(tmp_path / "other")  # of a model with more layers
    places = {
        "run": run,
        "text": tmp_path,
        "tokenizer": project.tokenizer,
        "other": tmp_path / "other",
    }
    given = {
        name: value.format(**places) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    ended = call(*options(project, tmp_path / "run", "finetune", **given))
    assert ended.code == code
    assert words in " ".join(ended.err.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 8}, "lora_rank 4 -> 8"),
        ({"lora_variant": "dora"}, "lora_variant none -> dora"),
        ({"lora_rank": None, "lora_alpha": None}, "lora_rank 4 -> none"),
        ({"lora_rank": None, "lora_alpha": None, "freeze": "norm"}, "freeze none -> norm"),
    ],
    ids=str,
)
def test_a_run_goes_on_with_what_it_trains(
    run: Path, project: Project, changes: dict, words: str
) -> None:
    ended = call(*options(project, run, "finetune", **LORA | {"train_iters": 8} | changes))
    assert ended.code == 2
    assert words in " ".join(ended.err.split())


ALIKE = [
    ({"lora_rank": 4}, {"lora_rank": 4, "lora_alpha": 8, "lora_variant": "lora", "lora_plus": 1}),
    ({"lora_rank": 4}, {"lora_rank": 4, "lora_target": "fc2, fc1,proj,qkv"}),
    ({"lora_rank": 2, "lora_target": "qkv,fc1"}, {"lora_rank": 2, "lora_target": "fc1,qkv"}),
    ({"lora_rank": 4, "lora_alpha": 12, "adapter": Path("a")}, {"lora_rank": 4, "lora_alpha": 12}),
]
OTHERS = [
    ({"lora_rank": 4}, {"lora_rank": 4, "lora_alpha": 9}, "lora_alpha none -> 9.0"),
    ({"lora_rank": 4}, {"lora_rank": 4, "lora_target": "qkv"}, "lora_target none -> qkv"),
    ({"lora_rank": 4}, {"lora_rank": 4, "lora_variant": "rslora"}, "lora_variant none -> rslora"),
    ({"lora_rank": 4}, {"lora_rank": 4, "lora_plus": 16.0}, "lora_plus none -> 16.0"),
    ({"lora_rank": 4}, {}, "lora_rank 4 -> none"),
]


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [(*pair, None) for case in ALIKE for pair in (case, case[::-1])] + OTHERS,
    ids=str,
)
def test_adapters_are_compared_by_what_their_options_amount_to(
    before: dict, now: dict, change: str | None
) -> None:
    def origin(changes: dict) -> Origin:
        values = {"model": Path("m"), "data": ["d"], "save": Path("r"), "train_iters": 1}
        options = FinetuneConfig.parse({**values, **changes}, strict=False).to_options()
        return Origin("finetune", {}, [], {k: v for k, v in options.items() if "lora" in k})

    changes = origin(now).changes({"options": origin(before).options})
    assert list(map(str, changes)) == ([] if change is None else [change])


def test_pretrain_has_no_adapters(project: Project, tmp_path: Path) -> None:
    ended = call(*options(project, tmp_path / "run", lora_rank=4))
    assert ended.code == 2
    assert "--lora-rank" in ended.err


def test_the_plan_counts_the_adapter_alone(project: Project, tmp_path: Path) -> None:
    whole, part = (
        succeed(*options(project, tmp_path / "run", "finetune", dry_run=True, **changes)).out
        for changes in ({}, LORA)
    )
    assert "checkpoint: 0.00 GiB" in part
    assert whole != part
