"""The flags of ModelLink's and MindSpeed-LLM's programs, and what becomes of each in glm3.

The first tables have the flags that are options of glm3, `NEEDLESS` those that it does without, and
why, and `REFUSED` those that it can't take over, and what to do. Flags that depend on others are in
`training`, `running` and `preparing`. Sources: the parsers of ModelLink 1.0 to 1.2 and of
MindSpeed-LLM 2.0 to 2.3, and of the Megatron-LM that they are made for.
"""

from collections.abc import Callable, Sequence
from typing import Any

Convert = Callable[[Sequence[str]], Any]


def _text(values: Sequence[str]) -> str:
    return " ".join(values)


def _number(values: Sequence[str]) -> float:
    return float(values[0])


def _whole(values: Sequence[str]) -> int:
    return int(values[0])


def _on(_values: Sequence[str]) -> bool:
    return True


def _off(_values: Sequence[str]) -> bool:
    return False


# Of all programs that run a model: the option, and how its value is read.
PARALLEL: dict[str, tuple[str, Convert]] = {
    "--tensor-model-parallel-size": ("tp", _whole),
    "--pipeline-model-parallel-size": ("pp", _whole),
    "--num-layer-list": ("layers_per_stage", _text),
    "--seed": ("seed", _whole),
}
TRAIN: dict[str, tuple[str, Convert]] = {
    **PARALLEL,
    "--context-parallel-size": ("cp", _whole),
    "--sequence-parallel": ("sequence_parallel", _on),
    "--use-distributed-optimizer": ("distributed_optimizer", _on),
    "--overlap-grad-reduce": ("overlap_grad_reduce", _on),
    "--overlap-param-gather": ("overlap_param_gather", _on),
    "--recompute-granularity": ("recompute", _text),
    "--recompute-method": ("recompute_method", _text),
    "--recompute-num-layers": ("recompute_num_layers", _whole),
    "--seq-length": ("seq_length", _whole),
    "--micro-batch-size": ("micro_batch_size", _whole),
    "--global-batch-size": ("global_batch_size", _whole),
    "--split": ("split", _text),
    "--train-iters": ("train_iters", _whole),
    "--lr": ("lr", _number),
    "--min-lr": ("min_lr", _number),
    "--lr-decay-style": ("lr_decay_style", _text),
    "--lr-warmup-fraction": ("lr_warmup_fraction", _number),
    "--lr-warmup-iters": ("lr_warmup_iters", _whole),
    "--weight-decay": ("weight_decay", _number),
    "--clip-grad": ("clip_grad", _number),
    "--adam-beta1": ("adam_beta1", _number),
    "--adam-beta2": ("adam_beta2", _number),
    "--adam-eps": ("adam_eps", _number),
    "--initial-loss-scale": ("initial_loss_scale", _number),
    "--save": ("save", _text),
    "--save-interval": ("save_interval", _whole),
    "--eval-interval": ("eval_interval", _whole),
    "--eval-iters": ("eval_iters", _whole),
    "--log-interval": ("log_interval", _whole),
    "--exit-duration-in-mins": ("exit_duration", _number),
    "--npu-deterministic": ("deterministic", _on),
    "--use-deter-comp": ("deterministic", _on),
    "--deterministic-mode": ("deterministic", _on),
}
TUNE: dict[str, tuple[str, Convert]] = {
    "--tokenizer-padding-side": ("padding_side", _text),
    "--pad-to-multiple-of": ("pad_to_multiple", _whole),
    "--pack": ("packing", _on),
    "--neat-pack": ("packing", _on),
    "--dpo-beta": ("beta", _number),
    "--simpo-beta": ("beta", _number),
    "--dpo-loss-type": ("preference_loss", _text),
    "--dpo-label-smoothing": ("label_smoothing", _number),
    "--pref-ftx": ("sft_weight", _number),
    "--ref-model": ("reference", _text),
}
SAMPLE: dict[str, tuple[str, Convert]] = {
    **PARALLEL,
    "--max-new-tokens": ("max_new_tokens", _whole),
    "--temperature": ("temperature", _number),
    "--top-p": ("top_p", _number),
    "--top-k": ("top_k", _whole),
    "--num-beams": ("num_beams", _whole),
    "--greedy": ("greedy", _on),
}
PREPROCESS: dict[str, tuple[str, Convert]] = {
    "--input": ("input", list),
    "--tokenizer-name-or-path": ("tokenizer", _text),
    "--output-prefix": ("output_prefix", _text),
    "--workers": ("workers", _whole),
    "--n-subs": ("workers", _whole),
    "--log-interval": ("log_interval", _whole),
    "--append-eod": ("append_eod", _on),
    "--json-keys": ("json_keys", list),
    "--seq-length": ("seq_length", _whole),
    "--pack": ("pack", _on),
}

# What Megatron-LM does where its scripts say nothing, and glm3 would do otherwise.
DEFAULTS: dict[str, Any] = {
    "lr_decay_style": "linear",
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
    "split": "969,30,1",
}

_FROM_CONFIG = "the model's config.json says it"
_FROM_SHAPE = "it follows from the others"
_FASTEST = "the device's own kernels are used where they are right"
_ALWAYS = "glm3 always does so"
_STARTS_ANEW = "--model brings the weights alone; a stopped run goes on by itself"
_BY_LAUNCH = "glm3 chooses it for the device"
_SPEED = "it changes speed or memory alone, and glm3 does without"
_TOKENIZER = "glm3 reads the tokenizer's own files"
_FORMAT = "glm3 finds out what a folder holds, and writes one format"
_LOG = "metrics.jsonl and the log have everything"

_SHAPE_FLAGS = """--num-layers --hidden-size --ffn-hidden-size --num-attention-heads
--group-query-attention --num-query-groups --kv-channels --max-position-embeddings
--padded-vocab-size --vocab-size --make-vocab-size-divisible-by --pad-vocab-size-to
--disable-bias-linear --add-bias-linear --add-qkv-bias --no-add-qkv-bias --position-embedding-type
--use-partial-rope --use-glm-rope --rotary-percent --rotary-base --partial-rotary-factor
--use-rotary-position-embeddings --use-rotary-position-embedding --no-position-embedding
--rope-scaling-type --rope-scaling-factor --rope-scaling-original-max-position-embeddings
--normalization --norm-epsilon --swiglu --untie-embeddings-and-output-weights
--no-untie-embeddings-and-output-weights --post-norm --spec --query-pre-attn-scalar
--apply-query-key-layer-scaling --model-type-hf --model-type"""
_GROUPS: list[tuple[str, str]] = [
    (_FROM_CONFIG, _SHAPE_FLAGS),
    (
        _FASTEST,
        """--use-flash-attn --use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb
        --use-fused-mlp --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion
        --no-bias-dropout-fusion --no-rope-fusion --no-gradient-accumulation-fusion
        --gemm-gradient-accumulation-fusion --shape-order --sparse-mode --transformer-impl
        --use-mcore-models --use-fused-ring-attention-update --attention-mask-type
        --cp-attention-mask-type --fill-neg-inf --square-alibi-mask""",
    ),
    (
        _ALWAYS,
        """--attention-softmax-in-fp32 --no-attention-softmax-in-fp32 --finetune
        --exit-on-missing-checkpoint --no-check-for-nan-in-loss-and-grad --use-cpu-initialization
        --untie-weights --accumulate-allreduce-grads-in-fp32 --use-kv-cache --variable-seq-lengths
        --no-pad-to-seq-lengths --is-instruction-dataset --is-pairwise-dataset
        --no-shared-storage --no-create-attention-mask-in-dataloader
        --create-attention-mask-in-dataloader --dataloader-type --skip-bias-add
        --reset-attention-mask-in-packs --overwrite-cache --dataset-impl --data-impl""",
    ),
    (_STARTS_ANEW, "--no-load-optim --no-load-rng --no-save-optim --no-save-rng"),
    (
        _BY_LAUNCH,
        """--distributed-backend --distributed-timeout-minutes --local-rank --local_rank
        --disable-gloo-group --jit-compile --bind_core --cpunodebind --membind""",
    ),
    (
        "the script's program ignores it unless ENABLE_MC2=1 is exported; --mc2 is glm3's",
        "--use-mc2 --use-ascend-mc2",
    ),
    (
        _SPEED,
        """--use-ascend-coc --coc-parallel-num --coc-fused-kernel
        --kv-head-repeat-before-uly-alltoall --use-cp-send-recv-overlap --ulysses-degree-in-cp
        --reuse-fp32-param --release-fp32-grad --num-workers --manual-gc --manual-gc-interval
        --recompute-in-advance --recompute-activation-function
        --recompute-activation-function-num-layers --recompute-norm --recompute-norm-num-layers
        --enable-recompute-layers-per-pp-rank --swap-attention --swap-modules --swap-optimizer
        --swap-optimizer-times --async-log-allreduce --lora-fusion
        --no-contiguous-buffers-in-local-ddp
        --optimize-recomp-communication-level --data-cache-path --output-layer-slice-num
        --inference-batch-times-seqlen-threshold --cut-max-seqlen --schedules-method
        --use-torch-fsdp2 --tp-2d --tp-x --tp-y --evaluation-dp""",
    ),
    (
        _TOKENIZER,
        """--tokenizer-type --tokenizer-model --tokenizer-not-use-fast --tokenizer-kwargs
        --vocab-file --merge-file --trust-remote-code --cache-dir --streaming""",
    ),
    (
        _FORMAT,
        """--ckpt-format --use-dist-ckpt --dist-ckpt-format --auto-detect-ckpt-format
        --load-checkpoint-loosely --max-queue-size --no-checking --use-legacy-models
        --megatron-path --w-pack --add-dense-bias --embed-layernorm""",
    ),
    (
        _LOG,
        """--log-throughput --log-timers-to-tensorboard --log-batch-size-to-tensorboard
        --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard --log-params-norm
        --log-num-zeros-in-grad --log-progress --log-level --timing-log-level
        --tensorboard-queue-size --tensorboard-log-interval""",
    ),
    (
        "glm3 reads every layout, and --export-hf writes a Hugging Face folder",
        "--enable-hf2mg-convert --enable-mg2hf-convert --only-convert-last-checkpoint",
    ),
    (_FROM_SHAPE, "--lr-decay-iters --lr-decay-samples --padded-samples --no-shuffle"),
]
NEEDLESS: dict[str, str] = {flag: why for why, flags in _GROUPS for flag in flags.split()}
# The flags of a model's shape, which are compared with its config.json if that is there.
SHAPE = frozenset(_SHAPE_FLAGS.split())

_OTHER_MODEL = "it is for models of another family"
_REFUSED_GROUPS: list[tuple[str, str]] = [
    (
        "glm3 trains no reward model and has no reinforcement learning: see --method dpo",
        """--reward-model --reward-tokens --placeholder-token --rollout-batch-size
        --no-post-layer-norm --orm""",
    ),
    ("use --lora-rank with --recompute full: weights stay in 16 bits", "--qlora --qlora-nf4"),
    (
        "convert the adapter to PEFT's layout, and give it as --adapter (going on) or --lora",
        "--lora-load --lora-dir",
    ),
    ("the layers beside the adapter stay as they are", "--lora-modules-to-save"),
    (
        "start the batch size at its full value, or run twice, with two --global-batch-size",
        "--rampup-batch-size",
    ),
    (
        "glm3's pretraining lets a token see all before it in its window, across documents",
        "--reset-attention-mask --reset-position-ids --eod-mask-loss",
    ),
    ("use --train-only or --freeze", "--freeze-layers"),
    ("use --recompute full, or --overlap-param-gather", "--o2-optimizer --o2-gradient"),
    (
        "glm3's --cp is Ulysses, which has no masks of its own",
        """--adaptive-cp-manually-set-mask-list --adaptive-cp-dynamic-attn-mask
        --adaptive-cp-only-reschedule --cp-window-size""",
    ),
    ("the family has no thinking that can be switched", "--enable-thinking"),
    ("use torchrun --max-restarts", "--enable-high-availability --enable-hbmfault-repair"),
    ("rename the columns of the data", "--map-keys"),
    ("split the data with --split", "--train-data-path --valid-data-path --test-data-path"),
    (_OTHER_MODEL, "--geglu --squared-relu --qk-layernorm --sliding-window --noop-layers"),
]
REFUSED: dict[str, str] = {flag: what for what, flags in _REFUSED_GROUPS for flag in flags.split()}
# Flags that begin so belong to models of other families.
_FOREIGN = (
    "--add-output", "--add-rmsnorm", "--attn-", "--attn-logit", "--beta-", "--cla-",
    "--dim-model", "--dynamic-", "--embedding-", "--expert-", "--fc-type", "--first-k-dense",
    "--fix-router", "--full-attention", "--gelu", "--high-freq", "--input-",
    "--interleave-sliding", "--kv-lora-rank", "--linear-", "--long-", "--longrope", "--low-freq",
    "--lu-lora", "--mamba", "--mla-", "--moe-", "--mtp-", "--multi-", "--n-group",
    "--n-shared-experts", "--no-enable-linear", "--noisy", "--norm-topk", "--num-experts",
    "--num-nextn", "--original-max", "--output-", "--output-logit", "--q-lora-rank", "--qk-",
    "--recompute-m", "--rmsnorm-", "--rope-scaling-", "--routed-", "--router", "--scale-",
    "--seq-aux", "--share", "--short-", "--target-expert", "--topk-", "--use-fused-moe",
    "--use-triton", "--v-head-dim",
)  # fmt: skip


def refusal(flag: str) -> str:
    """Returns what to do about a flag that no table takes over.

    Args:
        flag: The flag, with its dashes.
    """
    if flag in REFUSED:
        return REFUSED[flag]
    if flag.startswith(_FOREIGN):
        return _OTHER_MODEL
    return "glm3 doesn't know it: see --help of the command for what comes nearest"
