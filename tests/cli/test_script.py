"""`glm3 convert script` on short scripts of every kind, and the run.yaml files that they become."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm3cli.config.base import Settings
from glm3cli.config.evaluation import MmluConfig
from glm3cli.config.inference import GenerateConfig
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.config.scripts import flags
from glm3cli.config.training import FinetuneConfig, PretrainConfig
from tests.support.project import Project, call

SHAPE = """--num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} --swiglu \\
        --num-attention-heads {heads} --group-query-attention --num-query-groups {groups} \\
        --padded-vocab-size {vocab} --position-embedding-type rope --rotary-percent 0.5"""

TUNE = """#!/bin/bash
# a tuning, in the way of ModelLink's scripts
export CUDA_DEVICE_MAX_CONNECTIONS=1
export HCCL_CONNECT_TIMEOUT=1200
NPUS_PER_NODE=1
CKPT="your model path"  # set below
DATA=missing
TP=1
PP=1
WORLD_SIZE=$(($NPUS_PER_NODE*1))

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \\
    --nnodes 1 --node_rank 0 --master_addr localhost --master_port 6001
"
GPT_ARGS=(
    --tensor-model-parallel-size ${TP}
    --pipeline-model-parallel-size ${PP}
    SHAPE
    --seq-length 64 --micro-batch-size 1 --global-batch-size 4
    --finetune --is-instruction-dataset --stage sft --tokenizer-padding-side left
    --tokenizer-name-or-path "$CKPT" --tokenizer-type PretrainedFromHF
    --use-flash-attn --use-mc2 --attention-dropout 0.0 --hidden-dropout 0.0
    --recompute-granularity full --recompute-method block --recompute-num-layers 1
    --lr 1e-4 --min-lr 1e-5 --lr-warmup-fraction 0.1 --train-iters 10 --bf16
    "$@"
)
torchrun $DISTRIBUTED_ARGS posttrain_gpt.py \\
    "${GPT_ARGS[@]}" --data-path $DATA --split 100,0,0 --eval-iters 0 --eval-interval 100 \\
    --load "$CKPT" --save "$CKPT" --no-load-optim --no-load-rng \\
    --distributed-backend nccl | tee logs/tune.log
"""


@pytest.fixture
def shape(project: Project) -> str:
    raw = json.loads((project.model / "config.json").read_text("utf-8"))
    words = SHAPE.format(
        layers=raw["num_layers"], hidden=raw["hidden_size"], ffn=raw["ffn_hidden_size"],
        heads=raw["num_attention_heads"], groups=raw["multi_query_group_num"],
        vocab=raw["padded_vocab_size"],
    )  # fmt: skip
    return words.replace("\\\n", "")


def translated(script: Path, text: str, *words: str) -> list[dict[str, Any]]:
    script.write_text(text, "utf-8")
    ended = call("convert", "script", "--json", str(script), *words)
    assert ended.code == 0, ended.err
    found: list[dict[str, Any]] = json.loads(ended.out)["commands"]
    return found


def fates(found: dict[str, Any]) -> dict[str, str]:
    return {fate["flag"]: fate["outcome"] for fate in found["fates"]}


def test_a_tuning_becomes_a_run_yaml_that_passes_a_dry_run(
    project: Project, tmp_path: Path, shape: str
) -> None:
    script, config = tmp_path / "tune.sh", tmp_path / "run.yaml"
    script.write_text(TUNE.replace("SHAPE", shape), "utf-8")
    words = ["--set", f"CKPT={project.model}", "--set", f"DATA={project.task}"]
    ended = call("convert", "script", str(script), *words, "--output", str(config))
    assert (ended.code, ended.out) == (0, "")
    options = yaml.safe_load(config.read_text("utf-8"))
    assert options == {
        "model": str(project.model), "tokenizer": str(project.model), "data": str(project.task),
        "save": f"{project.model}-glm3", "dtype": "bf16", "method": "sft",
        "loss_average": "sample", "nproc": 1, "tp": 1, "pp": 1, "seq_length": 64,
        "micro_batch_size": 1, "global_batch_size": 4, "padding_side": "left", "recompute": "full",
        "recompute_method": "block", "recompute_num_layers": 1, "lr": 1e-4, "min_lr": 1e-5,
        "lr_warmup_fraction": 0.1, "train_iters": 10, "split": "100,0,0",
        "lr_decay_style": "linear", "weight_decay": 0.01, "adam_beta2": 0.999,
    }  # fmt: skip
    ran = call("finetune", "--config", str(config), "--dry-run")
    assert ran.code == 0, ran.err
    assert "run: 10 steps" in ran.out
    text = config.read_text("utf-8")
    assert text.startswith("# posttrain_gpt.py, line 28\n# glm3 finetune --config run.yaml\n")
    assert "#   --use-mc2                                the script's program ignores it" in text
    assert "HCCL_CONNECT_TIMEOUT" in ended.err
    assert "lr_decay_style linear is the default of the script's program" in ended.err


def test_flags_that_are_not_supported_or_contradict_the_model_are_named(
    project: Project, tmp_path: Path, shape: str
) -> None:
    text = TUNE.replace("SHAPE", shape.replace("0.5", "0.51"))
    more = ["--moe-router-topk", "2", "--qlora", "--num-layers", "99", "--nonsense", "--tp-x"]
    [found] = translated(tmp_path / "x.sh", text, "--set", f"CKPT={project.model}", "--", *more)
    outcomes = fates(found)
    assert {flag for flag, outcome in outcomes.items() if outcome == "not supported"} == {
        "--moe-router-topk", "--qlora", "--num-layers", "--nonsense", "--rotary-percent"
    }  # fmt: skip
    assert outcomes["--tp-x"] == "needless here"
    notes = "\n".join(found["notes"])
    assert "--rotary-percent 0.51: the model rotates 0.5 of each head" in notes
    assert "--num-layers 99 contradicts the model's config.json" in notes
    ended = call("convert", "script", str(tmp_path / "x.sh"), "--", *more)
    assert "not supported: --qlora : use --lora-rank" in ended.err


CALL = "torchrun --nproc-per-node=8 --nnodes=2 run/{program} {flags}\n"


def test_pretraining_from_random_weights_with_a_blend(tmp_path: Path) -> None:
    text = CALL.format(
        program="pretrain_gpt.py",
        flags="--num-layers 28 --hidden-size 4096 --ffn-hidden-size 13696 --num-query-groups 2"
        " --padded-vocab-size 65024 --num-attention-heads 32 --data-path 0.3 a 0.7 b/c"
        " --seq-length 32 --micro-batch-size 2 --pipeline-model-parallel-size 4"
        " --num-layers-per-virtual-pipeline-stage 1 --train-samples 640 --lr-warmup-samples 64"
        " --lr 1e-4 --fp16 --context-parallel-size 2 --context-parallel-algo ulysses_cp_algo"
        " --overlap-param-gather --tokenizer-name-or-path tok --tensorboard-dir logs"
        " --profile --profile-step-start 5 --profile-step-end 6 --hidden-dropout 0.2",
    )
    [found] = translated(tmp_path / "x.sh", text)
    assert found["command"] == ["pretrain"]
    expected = {
        "from_scratch": True, "model_config": "6b", "init_method_std": 0.02,
        "data": ["0.3:a", "0.7:b/c"], "global_batch_size": 4, "train_iters": 160,
        "lr_warmup_iters": 16, "pp": 4, "vpp": 7, "cp": 2, "overlap_grad_reduce": True,
        "initial_loss_scale": 2.0**32, "report_to": ["tensorboard"], "profile": "6:6",
        "eval_interval": 1000, "eval_iters": 100, "split": "969,30,1", "save": "run",
        "tokenizer": "tok", "dtype": "fp16",
    }  # fmt: skip
    assert expected.items() <= found["options"].items()
    assert "nproc" not in found["options"]
    assert fates(found)["--hidden-dropout"] == "not supported"
    assert not [note for note in found["notes"] if "refuse" in note]
    shown = call("convert", "script", str(tmp_path / "x.sh")).out
    assert "# torchrun --nnodes 2 --nproc_per_node N" in shown


def test_adapters_and_preferences(tmp_path: Path) -> None:
    common = "--load m --save s --data-path d --train-iters 5 --lr 1e-4 --seq-length 32"
    lora = "--stage sft --lora-r 8 --lora-target-modules query_key_value linear_fc1 --lora-fusion"
    dpo = "--stage dpo --is-pairwise-dataset --dpo-beta 0.2 --dpo-loss-type hinge --pref-ftx 0.1"
    simpo = "--stage simpo --is-pairwise-dataset --gamma-beta-ratio 0.5 --simpo-loss-type sigmoid"
    text = "".join(
        CALL.format(program="posttrain_gpt.py", flags=f"{common} {more}")
        for more in (lora, dpo, simpo)
    )
    adapter, preferences, margin = translated(tmp_path / "x.sh", text)
    wanted = {"lora_rank": 8, "lora_alpha": 32.0, "lora_target": "qkv,fc1"}
    assert wanted.items() <= adapter["options"].items()
    wanted = {"method": "dpo", "beta": 0.2, "preference_loss": "hinge", "sft_weight": 0.1}
    assert wanted.items() <= preferences["options"].items()
    wanted = {"method": "simpo", "beta": 2.5, "simpo_gamma": 1.25}
    assert wanted.items() <= margin["options"].items()
    for found in (adapter, preferences, margin):
        assert "not supported" not in fates(found).values()
        assert not [note for note in found["notes"] if "refuse" in note]
    second = call("convert", "script", str(tmp_path / "x.sh"), "--number", "2")
    assert yaml.safe_load(second.out)["beta"] == 0.2
    assert call("convert", "script", str(tmp_path / "x.sh"), "--number", "4").code == 2
    both = call("convert", "script", str(tmp_path / "x.sh"))
    assert len(list(yaml.safe_load_all(both.out))) == 3
    (tmp_path / "x.sh").write_text(CALL.format(program="posttrain_gpt.py", flags="--stage rm"))
    ended = call("convert", "script", str(tmp_path / "x.sh"))
    assert ended.code == 3
    assert "--stage rm trains what glm3 has no training for" in ended.err


def test_generating_and_evaluating(tmp_path: Path) -> None:
    model = "--load m --tokenizer-name-or-path t --bf16 --tensor-model-parallel-size 2 --seed 1"
    calls = {
        "inference.py": f"{model} --max-new-tokens 9 --top-p 0.9 --prompt-type chatglm3",
        "evaluation.py": f"{model} --task mmlu gsm8k --task-data-path d/test/ e --max-new-tokens 1",
    }
    text = "".join(f"python -m torch.distributed.launch {k} {v}\n" for k, v in calls.items())
    generate, mmlu, harness = translated(tmp_path / "x.sh", text)
    assert generate["command"] == ["generate"]
    assert generate["options"] == {
        "model": "m", "tokenizer": "t", "dtype": "bf16", "prompt": "how are you?", "raw": False,
        "tp": 2, "seed": 1, "max_new_tokens": 9, "top_p": 0.9,
    }  # fmt: skip
    assert mmlu["command"] == ["eval", "mmlu"]
    assert {"data_dir": "d", "protocol": "modellink", "tp": 2}.items() <= mmlu["options"].items()
    assert harness["command"] == ["eval", "harness"]
    assert {"tasks": "gsm8k", "tp": 2}.items() <= harness["options"].items()
    for found in (generate, mmlu, harness):
        assert "not supported" not in fates(found).values()


def test_preparing_data_and_weights(project: Project, tmp_path: Path) -> None:
    calls = {
        "./preprocess_data.py": "--input a.parquet b.jsonl --tokenizer-name-or-path t --workers 4"
        " --output-prefix out/a --handler-name AlpacaStyleInstructionHandler"
        """ --prompt-type chatglm3 --seq-length 64 --pack --map-keys '{"prompt":"instruction"}'""",
        "convert_ckpt.py": "--load-model-type hf --save-model-type mg --use-mcore-models"
        f" --load-dir {project.model} --save-dir 'mg out' --target-pipeline-parallel-size 1"
        " --num-layers-per-virtual-pipeline-stage 1",
        "tools/checkpoint/convert_ckpt.py": "--loader megatron --saver megatron --load-dir mg"
        " --save-model-type save_huggingface_chatglm3 --save-dir hf/ --add-qkv-bias",
        "convert_ckpt_v2.py": "--load-model-type mg --save-model-type mg --load-dir a"
        " --save-dir b --target-tensor-parallel-size 2",
    }
    text = "".join(f"python {k} {v}\n" for k, v in calls.items())
    data, to_mcore, to_hf, again = translated(tmp_path / "x.sh", text)
    assert data["options"] == {
        "handler": "chat", "input": ["a.parquet", "b.jsonl"], "tokenizer": "t", "workers": 4,
        "output_prefix": "out/a", "seq_length": 64, "pack": True,
    }  # fmt: skip
    assert to_mcore["command"] == ["convert", "hf2mg"]
    assert to_mcore["options"] == {"tp": 1, "pp": 1, "format": "mcore", "vpp": 2}
    assert (to_hf["command"], to_hf["arguments"]) == (["convert", "mg2hf"], ["mg", "hf/mg2hf"])
    assert again["options"] == {"tp": 2, "pp": 1, "format": "mcore"}
    for found in (data, to_mcore, to_hf, again):
        assert "not supported" not in fates(found).values()
    shown = call("convert", "script", str(tmp_path / "x.sh"), "--number", "2").out
    line = f"glm3 convert hf2mg {project.model} 'mg out' --tp 1 --pp 1 --format mcore --vpp 2\n"
    assert line in shown


@pytest.mark.parametrize(
    ("table", "config"),
    [
        (flags.TRAIN, PretrainConfig),
        (flags.TUNE, FinetuneConfig),
        (flags.SAMPLE, GenerateConfig),
        (flags.PREPROCESS, PreprocessConfig),
        ({k: v for k, v in flags.PARALLEL.items() if k != "--seed"}, MmluConfig),
        ({k: (k, list) for k in flags.DEFAULTS}, PretrainConfig),
    ],
)
def test_all_options_of_the_tables_are_there(table: dict[str, Any], config: type[Settings]) -> None:
    known = {str(config.flag_of(field).name) for field in config.option_fields()}
    assert {option for option, _ in table.values()} <= known


def test_no_flag_is_in_two_tables() -> None:
    taken = {*flags.TRAIN, *flags.TUNE, *flags.SAMPLE, *flags.PREPROCESS}
    assert not taken & flags.REFUSED.keys()
    assert not flags.NEEDLESS.keys() & flags.REFUSED.keys()
    assert not taken & flags.NEEDLESS.keys()


def test_a_script_without_any_of_the_programs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_text("torchrun train_other.py --lr 1\necho done\n")
    ended = call("convert", "script", str(tmp_path / "x.sh"))
    assert ended.code == 3
    assert "line 1: glm3 has nothing in place of train_other.py" in ended.err
    ended = call("convert", "script", str(tmp_path / "x.sh"), "--set", "novalue")
    assert ended.code == 2
