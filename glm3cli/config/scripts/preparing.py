"""Translates the calls of the replaced systems' programs that prepare data and weights."""

import json
from pathlib import Path

from glm3cli.config.model import ModelConfig
from glm3cli.config.preprocess import HANDLERS
from glm3cli.config.scripts.flags import PREPROCESS
from glm3cli.config.scripts.translation import Call, Flags, Translation
from glm3cli.errors import CheckpointError, ConfigError

# The handlers that MindSpeed-LLM has beside ModelLink 1.1's, and ours that read the same rows.
_STYLES = {
    "PairwiseHandler": "preference",
    "StyleInstructionHandler": "chat",
    "InstructionHandler": "chat",
}
# The forms of a conversation that glm3 writes by the model that the tokenizer belongs to.
_PROMPTS = ("chatglm2", "chatglm3", "glm4")
_USUAL_KEYS = {"prompt": "instruction", "query": "input", "response": "output"}
_TO_HF = "save_huggingface_"


def translate_preprocessing(call: Call) -> Translation:
    """Translates a call of preprocess_data.py.

    Args:
        call: The call.
    """
    flags = call.flags
    name = flags.value("--handler-name", "GeneralPretrainHandler")
    endings = (ours for ending, ours in _STYLES.items() if name.endswith(ending))
    handler = name if name in HANDLERS else next(endings, "")
    kind = HANDLERS.get(handler, "text")
    found = call.translation(["preprocess"], {})
    found.options["handler"] = handler or "text"
    if handler:
        flags.take("--handler-name", f"handler {handler}")
    else:
        flags.note("--handler-name", "not supported", "see `glm3 preprocess --help` for handlers")
    if kind == "text":
        flags.note("--seq-length", "not supported", "training cuts texts; leave long ones out")
        flags.note("--pack", "needless here", "training joins texts")
    _prompts(flags, found, kind)
    _columns(flags)
    found.options |= flags.take_all(PREPROCESS)
    flags.note("--neat-pack", "needless here", "in a pack no sample sees another")
    flags.note("--hf-datasets-params", "not supported", "fetch the data, and give its files")
    found.fates = flags.fates()
    return found


def _prompts(flags: Flags, found: Translation, kind: str) -> None:
    """Takes over the form of a conversation."""
    prompt = flags.value("--prompt-type")
    if kind == "text":
        flags.note("--prompt-type", "needless here", "a text has no turns")
    elif prompt in _PROMPTS:
        flags.take("--prompt-type", "the form of the model that the tokenizer belongs to")
    elif prompt == "chatglm3_system":
        flags.note("--prompt-type", "not supported", "put the system text into a column `system`")
        found.notes.append(
            "the script's prompts begin with a system text; glm3 takes it from the data's column "
            "`system`"
        )
    else:
        flags.note("--prompt-type", "not supported", "glm3 writes the model's own form")


def _columns(flags: Flags) -> None:
    """Looks at --map-keys: the names that glm3 reads anyway, or others."""
    try:
        keys = json.loads(flags.value("--map-keys", "{}"))
    except ValueError:
        return
    if isinstance(keys, dict) and all(_USUAL_KEYS.get(k) == v for k, v in keys.items()):
        flags.note("--map-keys", "needless here", "these are the names that glm3 reads")


def translate_converting(call: Call) -> Translation:
    """Translates a call of a program that converts checkpoints into a command line.

    Args:
        call: The call.
    """
    flags = call.flags
    source, target = flags.value("--load-dir", "SRC"), flags.value("--save-dir", "DST")
    loads_hf = flags.value("--load-model-type") == "hf" or flags.value("--loader").endswith("hf")
    saves_hf = flags.value("--save-model-type") == "hf" or flags.value(
        "--save-model-type"
    ).startswith((_TO_HF, "huggingface"))
    name = "hf2mg" if loads_hf else "mg2hf" if saves_hf else "mg2mg"
    found = call.translation(["convert", name], {})
    if saves_hf:
        target = f"{target.rstrip('/')}/mg2hf"
    found.arguments = [source, target]
    for flag, part in (("--load-dir", "SRC"), ("--save-dir", "DST")):
        flags.take(flag, part)
    for flag in ("--load-model-type", "--save-model-type", "--loader", "--saver"):
        flags.take(flag, f"the command {name}")
    if saves_hf:
        found.notes.append(
            "DST is a new folder inside --save-dir; config.json and the tokenizer come from SRC, "
            "or from the model beside it"
        )
        for flag in ("--target-tensor-parallel-size", "--target-pipeline-parallel-size"):
            flags.note(flag, "needless here", "a Hugging Face folder isn't cut")
        flags.note("--num-layer-list", "needless here", "SRC itself shows its stages")
    else:
        _cuts(call, found, source)
    if "--params-dtype" in flags:
        found.options["dtype"] = flags.value("--params-dtype")
        flags.take("--params-dtype", "dtype")
    for flag in ("--lora-r", "--lora-alpha", "--lora-target-modules"):
        flags.note(flag, "needless here", "an adapter in PEFT's layout says it itself")
    for flag in ("--source-tensor-parallel-size", "--source-pipeline-parallel-size"):
        flags.note(flag, "needless here", "SRC itself shows how it is cut")
    found.fates = flags.fates()
    return found


def _cuts(call: Call, found: Translation, source: str) -> None:
    """Takes over the parallel sizes of the new files, and their names."""
    flags, options = call.flags, found.options
    sizes = {
        "--target-tensor-parallel-size": "tp",
        "--target-pipeline-parallel-size": "pp",
    }
    for flag, option in sizes.items():
        options[option] = flags.whole(flag, 1)
        flags.take(flag, option)
    if "--num-layer-list" in flags:
        options["layers_per_stage"] = flags.value("--num-layer-list")
        flags.take("--num-layer-list", "layers_per_stage")
    is_mcore = "--use-mcore-models" in flags or call.program.endswith("_v2.py")
    options["format"] = "mcore" if is_mcore else "legacy"
    flags.take("--use-mcore-models", "format mcore")
    chunk = flags.whole("--num-layers-per-virtual-pipeline-stage")
    layers = _layers_at(Path(source))
    if chunk and layers and layers % (options["pp"] * chunk) == 0:
        options["vpp"] = layers // (options["pp"] * chunk)
        flags.take("--num-layers-per-virtual-pipeline-stage", "vpp: layers / pp / it")
    flags.note(
        "--num-layers-per-virtual-pipeline-stage", "not supported", "give --vpp: layers / pp / it"
    )


def _layers_at(folder: Path) -> int:
    """Returns the number of layers of the model in a folder; 0 if it can't be read."""
    try:
        return ModelConfig.from_file(folder).num_layers
    except (CheckpointError, ConfigError):
        return 0
