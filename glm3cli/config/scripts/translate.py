"""`translate`: the commands of glm3 that the programs of a script amount to."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_origin

from glm3cli.config.base import Settings
from glm3cli.config.evaluation import EvalConfig, HarnessConfig, MmluConfig
from glm3cli.config.inference import GenerateConfig
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.config.scripts.preparing import translate_converting, translate_preprocessing
from glm3cli.config.scripts.running import translate_evaluating, translate_generating
from glm3cli.config.scripts.shell import read_script
from glm3cli.config.scripts.training import translate_training
from glm3cli.config.scripts.translation import Call, Translation
from glm3cli.config.training import FinetuneConfig, PretrainConfig
from glm3cli.errors import ConfigError, DataError

# The programs that glm3 replaces, by the names that they have in one release or another.
_PROGRAMS: dict[str, Callable[[Call], Translation | list[Translation]]] = {
    "pretrain_gpt.py": translate_training,
    "posttrain_gpt.py": translate_training,
    "inference.py": translate_generating,
    "evaluation.py": translate_evaluating,
    "preprocess_data.py": translate_preprocessing,
    "convert_ckpt.py": translate_converting,
    "convert_ckpt_v2.py": translate_converting,
    "util.py": translate_converting,
}
_CONFIGS: dict[str, type[Settings]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "generate": GenerateConfig,
    "preprocess": PreprocessConfig,
    "eval mmlu": MmluConfig,
    "eval ceval": EvalConfig,
    "eval cmmlu": EvalConfig,
    "eval harness": HarnessConfig,
}
# Exported variables that have a meaning for glm3, too; it says which are right (`glm3 doctor`).
_ENVIRONMENT = ("HCCL_", "ASCEND_", "PYTORCH_NPU_", "TASK_QUEUE_", "CPU_AFFINITY_", "HCC", "NPU_")


def translate(
    path: Path, arguments: Sequence[str], variables: Mapping[str, str]
) -> tuple[list[Translation], list[str]]:
    """Translates a script of ModelLink or MindSpeed-LLM, without executing any of it.

    Args:
        path: The script.
        arguments: The arguments that it would be called with.
        variables: Values that replace those that the script gives to variables of these names.

    Returns:
        The commands that its programs amount to, and sentences about the script itself.

    Raises:
        DataError: The script can't be read, is no bash, or starts no program that glm3 replaces;
            or its training is one that glm3 doesn't have.
    """
    script = read_script(path, arguments, variables)
    found: list[Translation] = []
    unknown: list[str] = []
    for invocation in script.invocations:
        call = Call.of(invocation)
        if call is None:
            continue
        program = _PROGRAMS.get(call.program)
        if program is None:
            unknown.append(f"line {call.line}: glm3 has nothing in place of {call.program}")
            continue
        made = program(call)
        found += made if isinstance(made, list) else [made]
    if not found:
        known = ", ".join(dict.fromkeys(_PROGRAMS))
        raise DataError(
            f"{path} starts no program that glm3 replaces" + "".join(f"; {u}" for u in unknown),
            f"give a script that starts one of {known}",
        )
    kept = [name for name in script.exports if name.startswith(_ENVIRONMENT)]
    if kept:
        unknown.append(
            f"the script exports {', '.join(kept)}: `glm3 doctor` says what is needed of these"
        )
    for one in found:
        one.notes += _refusals(one)
    return found, [*script.notes, *unknown]


def _refusals(found: Translation) -> list[str]:
    """Returns what glm3 itself says against the options, where they don't go together."""
    config = _CONFIGS.get(" ".join(found.command))
    if config is None:
        return []
    values = {}
    for name in config.option_fields():
        option = str(config.flag_of(name).name)
        if option in found.options:
            value, takes = found.options[option], config.model_fields[name].annotation
            values[name] = (
                [value] if get_origin(takes) is list and isinstance(value, str) else value
            )
    try:
        config.parse(values, strict=False)
    except ConfigError as error:
        return [f"glm3 would refuse this: {error.message}"]
    return []
