"""`run_training`: a training on one rank, from its process groups to its last checkpoint."""

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import yaml

from glm3cli.checkpoint.locate import iteration_folder
from glm3cli.checkpoint.run.durable import finish_publishing
from glm3cli.checkpoint.run.resume import disk_trouble
from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.identity import check_same_data
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.device import PACKAGES, require_active
from glm3cli.host.files import write_text
from glm3cli.host.versions import versions
from glm3cli.parallel.groups import Grid, open_grid
from glm3cli.parallel.launch import is_speaker
from glm3cli.parallel.storage import Storage, find_storage, tell, together
from glm3cli.plan.describe import checkpoint_bytes
from glm3cli.plan.fit import check_device
from glm3cli.plan.parameters import frozen_of_model, parameters_of_model
from glm3cli.train.candidates import choose
from glm3cli.train.checkpointer import Checkpointer, claimed
from glm3cli.train.loop import Trainer
from glm3cli.train.origin import Change, check_goes_on
from glm3cli.train.preferences.reference import Reference
from glm3cli.train.prepare import Prepared
from glm3cli.train.probe import MakeProbes, no_probes
from glm3cli.train.profile import Profiler
from glm3cli.train.progress.flops import Utilisation
from glm3cli.train.progress.state import State
from glm3cli.train.report.metrics import Metrics
from glm3cli.train.resumable import find_resume
from glm3cli.train.setup import build_training, starting_weights
from glm3cli.train.signals import StopFlag
from glm3cli.train.weights.adapter import adapter_config


def run_training(
    prepared: Prepared, blend: Blend, probes: MakeProbes | None = None
) -> tuple[Path, Path]:
    """Trains to the last iteration; every rank must call it, with an active device.

    Args:
        prepared: The checked training.
        blend: The data sets to train on, all of them preprocessed.
        probes: Makes what looks at the model with each validation; None for nothing.

    Returns:
        The final checkpoint, and the one with the result: with --keep-best the best, else the
        final one.

    Raises:
        Glm3Error: Any of its subclasses; message and hint say what is wrong, and what to do.
    """
    config, model = prepared.config, prepared.model
    find_resume(config.save, config.resume)  # a wrong --resume is reported before all else
    device = require_active()
    warning = check_device(config, model, device.saved_for_backward, device.memory_left)
    utilisation = _utilisation(config, model)
    if config.deterministic:
        device.make_deterministic()
    with ExitStack() as stack:
        if is_speaker():
            stack.enter_context(claimed(config.save))
        grid = stack.enter_context(open_grid(config, config.seed))
        with disk_trouble(config.save):
            storage = find_storage(config.save)
        with together():
            if storage.is_leader and grid.rank != 0:
                stack.enter_context(claimed(config.save))
        metrics = Metrics(
            config,
            is_speaker=grid.rank == 0,
            utilisation=utilisation,
            world_size=grid.world_size,
        )
        for remark in (utilisation.describe(), *device.remarks, *filter(None, [warning])):
            metrics.say(remark)
        device.tune_memory_for_training()
        try:
            return _train(prepared, blend, grid, metrics, storage, probes or no_probes)
        finally:
            metrics.close()


def _train(
    prepared: Prepared,
    blend: Blend,
    grid: Grid,
    metrics: Metrics,
    storage: Storage,
    make_probes: MakeProbes,
) -> tuple[Path, Path]:
    """Trains in process groups that are open, with a report that is open.

    Args:
        prepared: The checked training.
        blend: The data sets to train on.
        grid: This rank's place among the parallel groups.
        metrics: The report of the run.
        storage: The storage of this rank that the run's folder is on.
        make_probes: Makes what looks at the model with each validation.

    Returns:
        The final checkpoint of the run (the one that it went on from, if nothing was left to do),
        and the one with its result: with --keep-best the best, else the final one.
    """
    config = prepared.config
    stop = StopFlag(require_active().torch_device(), config.exit_duration)
    check_same_data(blend, prepared.kind)
    with disk_trouble(config.save):
        finish_publishing(config.save, storage)
    resume = choose(config.save, config.resume, storage, metrics)
    changes = _changes(prepared, resume, grid)
    if grid.rank == 0:
        write_run_file(config)
    start = partial(starting_weights, prepared)
    reference = Reference.of(prepared, blend, start, stop, metrics.say)
    parts = build_training(prepared, blend, grid, with_weights=resume is None, reference=reference)
    metrics.sources = parts.train.consumed_by_source
    checkpointer = _checkpointer(prepared, parts.tokenizer, grid, storage)
    with together():
        checkpointer.check_space()
    _report_start(prepared, blend, grid, metrics, storage)
    state = State()
    if resume is not None:
        state = checkpointer.load(resume, parts.train_step, metrics, changes=changes)
        _warn(config, resume, state, changes or [], metrics)
        if config.keep_best:
            _forget_lost_best(config, state, checkpointer, metrics)
    profiler = Profiler(config.save, config.profile_steps, require_active(), grid.rank)
    first = state.iteration
    probes = make_probes(prepared.model, parts.tokenizer, parts.train)
    state = Trainer(config, parts, state, metrics, checkpointer, profiler, stop, probes).run()
    last = config.save / iteration_folder(state.iteration)
    if resume is not None and state.iteration == first:
        last = resume
    best = config.save / iteration_folder(state.best_iteration)
    result = best if config.keep_best and state.best_loss is not None else last
    if config.export_hf is not None:
        checkpointer.make_whole(result, metrics)
    return last, result


def _checkpointer(
    prepared: Prepared, tokenizer: Tokenizer, grid: Grid, storage: Storage
) -> Checkpointer:
    """Returns what writes and restores the checkpoints of a run."""
    config = prepared.config
    return Checkpointer(
        run=config.save,
        model=prepared.model,
        companions=prepared.companions,
        tokenizer=tokenizer.path,
        keep_last=config.keep_last,
        num_bytes=checkpoint_bytes(config, prepared.model),
        in_background=config.async_save,
        storage=storage,
        origin=prepared.origin.to_dict() if grid.rank == 0 else {},
        adapter=adapter_config(config),
        keeps_best=config.keep_best,
    )


def _changes(prepared: Prepared, resume: Path | None, grid: Grid) -> list[Change] | None:
    """Returns in what a run that goes on differs from what was saved, or None if that isn't known.

    Every rank must call it.

    Args:
        prepared: The checked training.
        resume: The checkpoint that the run goes on from; None for one that starts anew.
        grid: This rank's place among the parallel groups.

    Raises:
        ConfigError: The command, the model or the data changed, and may not.
    """
    changes: list[Change] | None = []
    with together():
        if resume is not None and grid.rank == 0:
            allowed = prepared.config.allow_changed
            changes = check_goes_on(resume, prepared.origin, allowed)
    return tell(changes, 0)


def _warn(
    config: TrainConfig, resume: Path, state: State, changes: list[Change], metrics: Metrics
) -> None:
    """Warns of settings that changed unasked, and of a run that has nothing left to do.

    Args:
        config: The settings of the run.
        resume: The checkpoint that the run goes on from.
        state: The progress of the run at that checkpoint.
        changes: In what the run differs from the one that wrote it.
        metrics: The report of the run.
    """
    unasked = [str(change) for change in changes if change.name not in config.allow_changed]
    if unasked:
        metrics.say(f"warning: the run goes on with other settings: {'; '.join(unasked)}")
    if state.iteration >= config.train_iters:
        metrics.event("nothing_to_do", iteration=state.iteration, train_iters=config.train_iters)
        metrics.say(
            f"warning: NOTHING IS TRAINED: {resume} is at iteration {state.iteration}, and "
            f"--train-iters is {config.train_iters}; give more --train-iters to go on, or another "
            "--save to start anew"
        )


def _forget_lost_best(
    config: TrainConfig, state: State, checkpointer: Checkpointer, metrics: Metrics
) -> None:
    """Forgets the best step so far if its checkpoint isn't there, and says so.

    It was validated in a run without --keep-best, or in another folder. All ranks must call it.
    """
    if state.best_loss is not None and not checkpointer.has(state.best_iteration):
        metrics.say(
            f"warning: the best step so far, {state.best_iteration}, has no checkpoint in "
            f"{config.save}; --keep-best keeps the best of the steps that follow"
        )
        state.forget_best()


def _report_start(
    prepared: Prepared, blend: Blend, grid: Grid, metrics: Metrics, storage: Storage
) -> None:
    """Reports the start of the run: its parallel sizes, versions, settings, data and disks.

    Args:
        prepared: The checked training.
        blend: The data sets to train on.
        grid: This rank's place among the parallel groups.
        metrics: The report of the run.
        storage: The storage of this rank that the run's folder is on.
    """
    if not storage.is_shared:
        metrics.event("storages", number=len(storage.places), places=", ".join(storage.places))
    metrics.event(
        "start",
        command=prepared.kind.command,
        parameters=prepared.model.num_parameters,
        trained_parameters=parameters_of_model(prepared.config, prepared.model).trained,
        tp=grid.tp_size,
        pp=grid.pp_size,
        vpp=prepared.config.vpp,
        dp=grid.dp_size,
        cp=grid.cp_size,
        environment=require_active().settings(),
        without_kernels=", ".join(require_active().without_kernels) or "none",
        **versions(*PACKAGES),
        unsaid={"sources": [asdict(source) for source in prepared.data_sources(blend)]},
    )


def _utilisation(config: TrainConfig, model: ModelConfig) -> Utilisation:
    """Returns what turns tokens per second into MFU, with the device's peak or --peak-tflops."""
    device = require_active()
    peak = config.peak_tflops or device.peak_tflops(config.dtype)
    frozen = frozen_of_model(config, model)
    return Utilisation(model, config.seq_length, peak, device.chip(), frozen)


def write_run_file(config: TrainConfig) -> None:
    """Writes RUN/run.yaml, which has every option with its value and can be given to --config."""
    config.save.mkdir(parents=True, exist_ok=True)
    options = {key: value for key, value in config.to_options().items() if value is not None}
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    write_text(config.save / "run.yaml", text)
