"""Runs tasks of lm-evaluation-harness on our model: `glm3 eval harness`."""

import difflib
import importlib.util
import json
import os
from typing import TYPE_CHECKING, Any

from glm3cli.config.evaluation import HarnessConfig
from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.harness.code import check_can_run, code_is_run, not_allowed
from glm3cli.evals.harness.published import read_from
from glm3cli.evals.page.harness import write_harness
from glm3cli.evals.results import PACKAGES
from glm3cli.host.files import write_json
from glm3cli.host.versions import versions
from glm3cli.infer.opening import check_model
from glm3cli.parallel.launch import is_speaker, run_here

if TYPE_CHECKING:
    from glm3cli.data.tokens.tokenizer import Tokenizer
    from glm3cli.evals.harness.model import Ranks

# The parts of lm-evaluation-harness's result that we save; the others describe the machine.
_PARTS = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "samples",
)
_INSTALL = "pip install 'glm3[eval]'"


def check_installed() -> None:
    """Checks that the package lm-eval is installed, without importing it.

    Raises:
        ConfigError: It isn't installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("eval harness needs the package lm-eval, which isn't installed", _INSTALL)


def run_harness(config: HarnessConfig, quiet: bool = False) -> tuple[dict[str, Any], str] | None:
    """Runs tasks of lm-evaluation-harness and writes the result to `config.output`.

    Args:
        config: The model, the tasks, and the file for the result.
        quiet: Whether to show no progress bars.

    Returns:
        On rank 0, the result and the table that lm-evaluation-harness makes of it; None on the
        other ranks, and in a process that has only started the ranks.

    Raises:
        CheckpointError: The model can't be read.
        ConfigError: A task doesn't exist, or lm-eval isn't installed.
        DataError: The model has no tokenizer.
    """
    check_installed()
    check_model(config)
    if not run_here(config):
        return None
    if quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    # Wrong tasks and missing data are reported before the model is loaded.
    manager = load_tasks(config) if is_speaker() else None
    from glm3cli.evals.harness.model import Ranks
    from glm3cli.infer.load import open_model

    with open_model(config) as model:
        ranks, grid = Ranks(model, config.batch_size), model.engine.grid
        if grid.rank != 0:
            ranks.serve()
            return None
        with ranks.served():
            found = evaluate(ranks, model.tokenizer, config, manager)
        result = {
            "benchmark": "harness",
            "is_score": config.limit is None,
            **_plain(found),
            "settings": {**config.to_options(), "world_size": grid.world_size},
            "versions": versions(*PACKAGES, "lm-eval"),
        }
        write_json(config.output, result)
        write_harness(config.output, result)
    from lm_eval.utils import make_table

    tables = [make_table(found, part) for part in ("results", "groups") if part in found]
    return result, "\n".join(tables)


def evaluate(
    ranks: "Ranks", tokenizer: "Tokenizer", config: HarnessConfig, manager: Any
) -> dict[str, Any]:
    """Runs the tasks of `config`; for rank 0.

    Args:
        ranks: Answer what the tasks ask the model.
        tokenizer: The model's tokenizer.
        config: The tasks, and how many examples and prompts.
        manager: The `lm_eval.tasks.TaskManager` that knows the tasks.

    Returns:
        What `lm_eval.evaluator.simple_evaluate` returns.
    """
    from lm_eval.evaluator import simple_evaluate

    from glm3cli.evals.harness.model import model_of

    found: dict[str, Any] = simple_evaluate(
        model_of(ranks, f"chatglm3 {tokenizer.sha256}"),
        tasks=manager.match_tasks(list(config.task_names)),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        task_manager=manager,
        use_cache=None if config.use_cache is None else str(config.use_cache),
        log_samples=config.log_samples,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.chat_template,
        system_instruction=config.system,
        confirm_run_unsafe_code=config.run_code,
    )
    return found


def load_tasks(config: HarnessConfig) -> Any:
    """Loads the tasks of `config` with their data.

    Returns:
        A `TaskManager` that has them.

    Raises:
        ConfigError: A task doesn't exist, or runs code without --run-code.
        DataError: The data of a task can't be read.
        DeviceError: Code can't be kept from the network here.
    """
    if config.run_code:
        check_can_run()
    manager = _find_tasks(config)
    with read_from(config.data_dir), code_is_run(config.run_code):
        try:
            loaded = manager.load(manager.match_tasks(list(config.task_names)))
        except OSError as error:
            raise DataError(
                f"the data of --tasks {config.tasks} can't be read: {error}",
                "without a network, give the files of its authors by --data-dir, or tasks of your "
                "own by --include-path",
            ) from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not config.run_code:
            raise not_allowed(name)
        if config.data_dir is not None:
            _check_rows(config, name, task)
    manager.load = lambda _names: loaded  # which simple_evaluate would load anew
    return manager


def _check_rows(config: HarnessConfig, name: str, task: Any) -> None:
    """Checks that a folder has what a task asks, and its solved examples.

    Raises:
        DataError: It hasn't.
    """
    shots = task.config.num_fewshot
    if config.num_fewshot is not None and shots != 0:
        shots = config.num_fewshot
    if not len(task.eval_docs) or (shots and not len(task.fewshot_docs())):
        what = "solved examples" if len(task.eval_docs) else "questions"
        raise DataError(
            f"--data-dir {config.data_dir} has no {what} of the task {name}",
            "add the file of that split, as the authors publish it",
        )


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """Selects the parts of `found` that we save, with all values converted to those of JSON."""
    from lm_eval.utils import handle_non_serializable

    parts = {name: found[name] for name in _PARTS if name in found}
    parts["task_versions"] = found["versions"]
    plain: dict[str, Any] = json.loads(json.dumps(parts, default=handle_non_serializable))
    return plain


def _find_tasks(config: HarnessConfig) -> Any:
    """Returns a `TaskManager` that knows all tasks of `config`.

    Raises:
        ConfigError: A task doesn't exist.
    """
    from lm_eval.tasks import TaskManager

    path = None if config.include_path is None else str(config.include_path)
    if path is not None:
        # Listing the thousands of tasks that come with it takes ten seconds.
        manager = TaskManager(include_path=path, include_defaults=False)
        if not _unknown(config, manager):
            return manager
    manager = TaskManager(include_path=path)
    if unknown := _unknown(config, manager):
        raise ConfigError(
            f"lm-evaluation-harness has no task {_with_near(unknown, manager.all_tasks)}",
            "lm_eval ls tasks lists them; --include-path DIR adds your own",
        )
    return manager


def _unknown(config: HarnessConfig, manager: Any) -> list[str]:
    """Returns those of `config.task_names` that match no task; a name may have wildcards."""
    return [name for name in config.task_names if not manager.match_tasks([name])]


def _with_near(names: list[str], known: list[str]) -> str:
    """Lists `names`, each with the most similar one of `known`."""
    shown = []
    for name in names:
        near = difflib.get_close_matches(name, known, n=1)
        shown.append(repr(name) + (f" (did you mean {near[0]!r}?)" if near else ""))
    return ", ".join(shown)
