"""Translates the calls of the replaced systems' programs that generate and evaluate."""

from glm3cli.config.scripts.flags import PARALLEL, SAMPLE, TRAIN, TUNE
from glm3cli.config.scripts.shapes import compare_shape
from glm3cli.config.scripts.translation import Call, Translation

# glm3's own benchmarks, and the tasks of lm-evaluation-harness for the others.
_OWN = ("mmlu", "ceval", "cmmlu")
_HARNESS = {
    "boolq": "boolq",
    "gsm8k": "gsm8k",
    "bbh": "bbh",
    "agieval": "agieval",
    "human_eval": "humaneval",
    "hellaswag": "hellaswag",
}
_NO_TRAINING = "an answer needs neither batches nor a fixed length"
# Flags that these programs share with the training ones, and take no notice of.
_OF_TRAINING = (TRAIN.keys() | TUNE.keys()) - SAMPLE.keys()
# What the programs ask where nothing says what to ask.
_PROMPT = "how are you?"


def translate_generating(call: Call) -> Translation:
    """Translates a call of inference.py, which asks a question of its own or talks.

    Args:
        call: The call.
    """
    flags = call.flags
    found = call.translation(["generate"], {})
    _model(call, found)
    tasks = flags.values("--task")
    flags.take("--task", "chat" if "chat" in tasks else "the prompt")
    if "chat" in tasks:
        found.options["chat"] = True
    else:
        found.options["prompt"] = flags.value("--prompt", _PROMPT)
        flags.take("--prompt", "prompt")
        if "--prompt" not in flags:
            found.notes.append(f"the script's program asks {_PROMPT!r}; put your own prompt there")
    forms = ("--prompt-type", "--hf-chat-template", "--inference-prompt-type")
    if any(flag in flags for flag in forms) and "chat" not in tasks:
        found.options["raw"] = False
    for flag in forms:
        flags.take(flag, "--answer: the prompt is asked as a user's turn, in the model's own form")
    found.options |= flags.take_all(SAMPLE)
    flags.note("--max-length", "not supported", "give max_new_tokens, the length of the answer")
    flags.note("--history-turns", "needless here", "a chat keeps all turns that fit")
    flags.note("--add-eos-token", "not supported", "give stop_id, the numbers of the tokens")
    found.fates = flags.fates()
    return found


def translate_evaluating(call: Call) -> list[Translation]:
    """Translates a call of evaluation.py: one command for each of its tasks.

    Args:
        call: The call.
    """
    flags = call.flags
    tasks = flags.values("--task") or ["mmlu"]
    found = [_task(call, task, number) for number, task in enumerate(tasks)]
    flags.take("--task", "the command" if tasks[0] in _OWN else "tasks")
    flags.take("--evaluation-batch-size", "batch_size")
    flags.note("--max-new-tokens", "needless here", "a benchmark says itself how long answers are")
    flags.note("--no-chat-template", "needless here", "questions are asked as plain text")
    for flag in ("--alternative-prompt", "--instruction-template", "--chain-of-thought"):
        flags.note(flag, "not supported", "the questions have the benchmark's own form")
    flags.note("--broadcast", "needless here", "the ranks share the questions by themselves")
    for flag in ("--prompt-type", "--hf-chat-template"):
        flags.note(flag, "not supported", "questions are asked as plain text, as is usual")
    sizes = flags.take_all({flag: way for flag, way in PARALLEL.items() if flag != "--seed"})
    for one in found:
        one.options |= sizes
    flags.note("--seed", "needless here", "nothing is drawn")
    for flag in ("--temperature", "--top-p", "--top-k", "--greedy"):
        flags.note(flag, "needless here", "the likeliest answer counts")
    for one in found:
        one.fates = flags.fates()
    return found


def _task(call: Call, task: str, number: int) -> Translation:
    """Begins the translation of one task, the `number`-th of its call, counted from 0."""
    flags, own = call.flags, task in _OWN
    one = call.translation(["eval", task if own else "harness"], {})
    _model(call, one)
    if own:
        places = flags.values("--task-data-path") or ["DATA"]
        folder = places[min(number, len(places) - 1)].rstrip("/")
        one.options["data_dir"] = folder.removesuffix("/test").removesuffix("/val") or "."
        flags.take("--task-data-path", "data_dir, the folder above test and dev")
    else:
        one.options["tasks"] = _HARNESS.get(task, task)
        flags.note("--task-data-path", "needless here", "lm-evaluation-harness fetches its data")
        if task not in _HARNESS:
            one.notes.append(f"{task} may have another name in lm-evaluation-harness")
    if task == "mmlu":
        one.options["protocol"] = "modellink"
        one.notes.append(
            "protocol modellink counts as the script's program does; leave it out for Hendrycks' "
            "own, which most published scores have"
        )
    if "--evaluation-batch-size" in flags:
        one.options["batch_size"] = flags.whole("--evaluation-batch-size", 1)
    return one


def _model(call: Call, found: Translation) -> None:
    """Takes over the model, its tokenizer, its type, and the ranks."""
    flags, options = call.flags, found.options
    options["model"] = flags.value("--load", "MODEL")
    flags.take("--load", "model")
    if "--load" in flags:
        found.notes += compare_shape(flags, flags.value("--load"))
    if "--tokenizer-name-or-path" in flags:
        options["tokenizer"] = flags.value("--tokenizer-name-or-path")
        flags.take("--tokenizer-name-or-path", "tokenizer")
    if "--fp16" in flags or "--bf16" in flags:
        options["dtype"] = call.dtype
    if call.nodes == 1 and call.ranks:
        options["nproc"] = call.ranks
    unused = ("--seq-length", "--micro-batch-size", "--global-batch-size", "--sequence-parallel")
    for flag in unused:
        flags.note(flag, "needless here", _NO_TRAINING)
    for flag in ("--init-method-std", "--attention-dropout", "--hidden-dropout"):
        flags.note(flag, "needless here", "the weights are those of --load, without dropout")
    for flag in (*_OF_TRAINING, "--context-parallel-algo", "--distributed-timeout-minutes"):
        flags.note(flag, "needless here", "it is for training")
    for flag in ("--lora-r", "--lora-alpha", "--lora-target-modules"):
        flags.note(flag, "needless here", "an adapter in PEFT's layout (--lora) says it itself")
