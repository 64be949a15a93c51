"""Translates the calls of the replaced systems' training programs."""

from typing import Any

from glm3cli.config.presets import PRESETS
from glm3cli.config.scripts.flags import DEFAULTS, TRAIN, TUNE
from glm3cli.config.scripts.shapes import compare_shape
from glm3cli.config.scripts.translation import Call, Flags, Translation
from glm3cli.errors import DataError

_TARGETS = {
    "linear_qkv": "qkv",
    "query_key_value": "qkv",
    "linear_proj": "proj",
    "dense": "proj",
    "linear_fc1": "fc1",
    "dense_h_to_4h": "fc1",
    "linear_fc2": "fc2",
    "dense_4h_to_h": "fc2",
}
_STAGES = {"sft": "sft", "dpo": "dpo", "simpo": "simpo"}
_TUNINGS = ("--is-instruction-dataset", "--is-pairwise-dataset")
_SHAPE = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--num-query-groups": "num_query_groups",
    "--padded-vocab-size": "padded_vocab_size",
}


def translate_training(call: Call) -> Translation:
    """Translates a call of pretrain_gpt.py or posttrain_gpt.py.

    Args:
        call: The call.

    Raises:
        DataError: It trains a reward model, or by reinforcement learning.
    """
    flags = call.flags
    stage = flags.value("--stage")
    tunes = bool(stage in _STAGES or any(flag in flags for flag in _TUNINGS))
    tunes |= call.program.startswith("posttrain") and stage != "pretrain"
    found = call.translation(["finetune" if tunes else "pretrain"], {})
    _start(call, found)
    found.options |= _data(flags)
    found.options["dtype"] = call.dtype
    if tunes:
        _tuning(flags, found, stage)
    _parallel(call, found)
    found.options |= flags.take_all(TRAIN | (TUNE if tunes else {}))
    _finish(call, found)
    found.fates = flags.fates()
    return found


def _start(call: Call, found: Translation) -> None:
    """Takes over where the weights and the tokenizer come from, and where the result goes."""
    flags, options = call.flags, found.options
    place = flags.value("--load")
    if place:
        options["model"] = place
        flags.take("--load", "model")
        found.notes += compare_shape(flags, place)
    else:
        shapes: dict[str, int] = {option: flags.whole(flag) for flag, option in _SHAPE.items()}
        shapes |= {"sandwich_norms": "--post-norm" in flags}
        same = (name for name, model in PRESETS.items() if shapes.items() <= dict(model).items())
        options |= {"from_scratch": True, "model_config": next(same, "config.json")}
        options["init_method_std"] = float(flags.value("--init-method-std", "0.02"))
        found.notes.append(
            "without --load the script starts from random weights, of the shape model_config"
        )
    if "--init-method-std" in flags:
        flags.note(
            "--init-method-std",
            "needless here" if place else "taken over",
            "the weights are those of --load" if place else "init_method_std",
        )
    if "--tokenizer-name-or-path" in flags:
        options["tokenizer"] = flags.value("--tokenizer-name-or-path")
        flags.take("--tokenizer-name-or-path", "tokenizer")
    if place and flags.value("--save") == place:
        options["save"] = f"{place.rstrip('/')}-glm3"
        flags.take("--save", "save, beside --load: a run of glm3 has a folder of its own")
    elif "--save" not in flags:
        options["save"] = "run"
        found.notes.append("the script saves nothing; glm3's run goes into `run`")


def _data(flags: Flags) -> dict[str, Any]:
    """Takes over --data-path: one prefix, or weights and prefixes in turn."""
    items = flags.values("--data-path")
    flags.take("--data-path", "data")
    if len(items) > 1 and len(items) % 2 == 0 and all(map(_is_number, items[::2])):
        items = [
            f"{weight}:{prefix}" for weight, prefix in zip(items[::2], items[1::2], strict=True)
        ]
    return {"data": items[0] if len(items) == 1 else items} if items else {}


def _tuning(flags: Flags, found: Translation, stage: str) -> None:
    """Takes over what makes a training a tuning: its method, its adapter, its loss."""
    options = found.options
    for flag in _TUNINGS:
        flags.take(flag, "the command finetune")
    if stage and stage not in _STAGES:
        raise DataError(
            f"line {found.line}: --stage {stage} trains what glm3 has no training for",
            "glm3 finetune has --method sft, dpo, orpo, simpo and kto",
        )
    if stage:
        options["method"] = _STAGES[stage]
        flags.take("--stage", "method")
    if options.get("method", "sft") == "sft":
        per_token = "--calculate-per-token-loss" in flags
        options["loss_average"] = "token" if per_token else "sample"
        flags.take("--calculate-per-token-loss", "loss_average token")
        if not per_token:
            found.notes.append(
                "loss_average is sample, as the script's program has it with one sample in a "
                "micro-batch; glm3's own choice is token, which weighs short answers less"
            )
    flags.note("--prompt-type", "needless here", "preprocess has written the prompts already")
    for flag in ("--handler-name", "--workers", "--enable-share-memory"):
        flags.note(flag, "needless here", "raw --data is preprocessed by itself")
    if options.get("method") == "simpo":
        options["beta"] = float(flags.value("--simpo-beta", "2.5"))
        ratio = float(flags.value("--gamma-beta-ratio", "1.4"))
        options["simpo_gamma"] = ratio * options["beta"]
        flags.take("--gamma-beta-ratio", "simpo_gamma: beta times it")
        if flags.value("--simpo-loss-type", "sigmoid") == "sigmoid":
            flags.note("--simpo-loss-type", "needless here", "glm3's simpo has it")
    if "--lora-target-modules" in flags or "--lora-r" in flags:
        options |= _adapter(flags)


def _adapter(flags: Flags) -> dict[str, Any]:
    """Takes over the options of LoRA, with MindSpeed-LLM's defaults."""
    names = flags.values("--lora-target-modules") or ["linear_qkv"]
    unknown = [name for name in names if name not in _TARGETS]
    flags.take("--lora-r", "lora_rank")
    flags.take("--lora-alpha", "lora_alpha")
    if unknown:
        flags.note("--lora-target-modules", "not supported", "targets are qkv, proj, fc1, fc2")
    flags.take("--lora-target-modules", "lora_target")
    targets = dict.fromkeys(_TARGETS[name] for name in names if name in _TARGETS)
    return {
        "lora_rank": flags.whole("--lora-r", 16),
        "lora_alpha": float(flags.value("--lora-alpha", "32")),
        **({"lora_target": ",".join(targets)} if targets else {}),
    }


def _parallel(call: Call, found: Translation) -> None:
    """Takes over the number of ranks, and the sizes that other programs count otherwise."""
    flags, options = call.flags, found.options
    if call.nodes == 1 and call.ranks:
        options["nproc"] = call.ranks
    chunk = flags.whole("--num-layers-per-virtual-pipeline-stage")
    if chunk:
        layers, pp = flags.whole("--num-layers"), flags.whole("--pipeline-model-parallel-size", 1)
        if layers and layers % (pp * chunk) == 0:
            options["vpp"] = layers // (pp * chunk)
            flags.take(
                "--num-layers-per-virtual-pipeline-stage", f"vpp {options['vpp']}: layers / pp / it"
            )
    if "--context-parallel-algo" in flags:
        algorithm = flags.value("--context-parallel-algo")
        same = algorithm == "ulysses_cp_algo"
        flags.note(
            "--context-parallel-algo",
            "taken over" if same else "needless here",
            "glm3's --cp is Ulysses" if same else "glm3's --cp is Ulysses, with the same results",
        )


def _finish(call: Call, found: Translation) -> None:
    """Fills in what the script leaves to its program's defaults, and drops what says nothing."""
    flags, options = call.flags, found.options
    for option, value in DEFAULTS.items():
        if option not in options:
            options[option] = value
            found.notes.append(f"{option} {value} is the default of the script's program")
    _batch(call, found)
    _validation(flags, found)
    if options.get("overlap_param_gather"):
        options["overlap_grad_reduce"] = True
    if options["dtype"] == "fp16" and "initial_loss_scale" not in options:
        options["initial_loss_scale"] = float(2**32)
    if "recompute" not in options:
        for name in ("recompute_method", "recompute_num_layers"):
            options.pop(name, None)
    if "--lr-warmup-samples" in flags:
        options["lr_warmup_iters"] = flags.whole("--lr-warmup-samples") // _step(options)
        flags.take("--lr-warmup-samples", "lr_warmup_iters")
    _dropout(flags, found)
    _reports(flags, options)


def _dropout(flags: Flags, found: Translation) -> None:
    """Notes where a script trains with dropout, which glm3 has none of."""
    for flag in ("--attention-dropout", "--hidden-dropout"):
        if flags.value(flag, "0.1") in ("0", "0.0", "0.", "0.00"):
            flags.note(flag, "needless here", "glm3 trains without dropout")
        elif flag in flags:
            flags.note(flag, "not supported", "glm3 trains without dropout, as the model was")
        else:
            found.notes.append(f"{flag} is 0.1 where a script leaves it out; glm3 has no dropout")


def _batch(call: Call, found: Translation) -> None:
    """Finds the global batch and the number of steps, which may follow from others."""
    flags, options = call.flags, found.options
    if "global_batch_size" not in options and call.ranks:
        cut = options.get("tp", 1) * options.get("pp", 1) * options.get("cp", 1)
        copies = max(1, call.ranks * call.nodes // cut)
        options["global_batch_size"] = options.get("micro_batch_size", 1) * copies
        found.notes.append("global_batch_size is micro_batch_size times the data parallel size")
    if "--train-samples" in flags:
        options["train_iters"] = flags.whole("--train-samples") // _step(options)
        flags.take("--train-samples", "train_iters")


def _step(options: dict[str, Any]) -> int:
    return int(options.get("global_batch_size", 1)) or 1


def _validation(flags: Flags, found: Translation) -> None:
    """Drops validations of no batch, or of a part of the data that holds nothing."""
    options = found.options
    parts = [*str(options["split"]).split(","), "0"]
    if options.get("eval_iters") == 0 or not float(parts[1] or 0):
        flags.note("--eval-interval", "needless here", "there is nothing to validate on")
        flags.note("--eval-iters", "needless here", "there is nothing to validate on")
        options.pop("eval_interval", None)
        options.pop("eval_iters", None)
        return
    options.setdefault("eval_interval", 1000)
    options.setdefault("eval_iters", 100)


def _reports(flags: Flags, options: dict[str, Any]) -> None:
    """Takes over experiment trackers and the profiler."""
    tools = {"--tensorboard-dir": "tensorboard", "--wandb-project": "wandb", "--use-wandb": "wandb"}
    names = list(dict.fromkeys(tool for flag, tool in tools.items() if flag in flags))
    if names:
        options["report_to"] = names
    for flag in tools:
        flags.take(flag, "report_to; the events go into the run's folder")
    if "--profile" in flags:
        start = flags.whole("--profile-step-start", 10)
        options["profile"] = f"{start + 1}:{flags.whole('--profile-step-end', 12)}"
        for flag in ("--profile", "--profile-step-start", "--profile-step-end"):
            flags.take(flag, "profile")
    for flag in ("--profile-ranks", "--profile-level", "--profile-save-path"):
        flags.note(flag, "needless here", "a trace of rank 0 goes into RUN/profile")
    for flag in ("--profile-with-cpu", "--profile-record-shapes", "--profile-with-stack"):
        flags.note(flag, "needless here", "the trace has it")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
