"""`glm3 convert`: converts models and adapters between layouts, and shows what a folder holds."""

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from glm3cli.cli import script
from glm3cli.cli.epilogs import CONVERT
from glm3cli.cli.options import command
from glm3cli.cli.progress import byte_progress
from glm3cli.config.convert import (
    AdapterOptions,
    ConvertConfig,
    InspectConfig,
    ToHfConfig,
    ToMegatronConfig,
)
from glm3cli.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from glm3cli.checkpoint.convert.inspect import Inspection
    from glm3cli.checkpoint.convert.serving import Server
    from glm3cli.config.convert import ConvertOptions

app = typer.Typer(no_args_is_help=True, help="Convert a model between layouts, or look at one.")


@command(app, ToMegatronConfig, "hf2mg", epilog=CONVERT)
def hf2mg(config: ToMegatronConfig) -> None:
    """Convert a Hugging Face model to Megatron's layouts."""
    _convert(config, config.options)


@command(app, ToHfConfig, "mg2hf", epilog=CONVERT)
def mg2hf(config: ToHfConfig) -> None:
    """Convert a Megatron model or a training run to a Hugging Face folder."""
    _convert(config, config.options)


@command(app, ToMegatronConfig, "mg2mg", epilog=CONVERT)
def mg2mg(config: ToMegatronConfig) -> None:
    """Cut a Megatron model or a training run for other parallel sizes."""
    _convert(config, config.options)


@command(app, AdapterOptions, "adapter")
def adapter(config: AdapterOptions) -> None:
    """Rename a LoRA adapter for the other Hugging Face layout; no weights are merged."""
    from glm3cli.checkpoint.adapter.config import read_adapter_config
    from glm3cli.checkpoint.convert.target import check_target
    from glm3cli.checkpoint.locate import locate_adapter

    check_target(config.target, config.source, force=config.force, kind="adapter")
    read_adapter_config(locate_adapter(config.source))
    from glm3cli.checkpoint.convert.adapter import convert_adapter

    modules = convert_adapter(
        config.source, config.target, config.model, config.layout, force=config.force
    )
    if config.as_json:
        paths = {"source": str(config.source), "target": str(config.target)}
        typer.echo(json.dumps(paths | {"layout": config.layout, "modules": modules}))
        return
    typer.echo(f"{config.target}: an adapter of {modules} modules, named as in {config.layout}")


@command(app, InspectConfig, "inspect")
def inspect(config: InspectConfig) -> None:
    """Show what a model folder holds: layout, sizes, types, and what is missing."""
    from glm3cli.checkpoint.convert.inspect import inspect

    checked = None
    if config.check:
        from glm3cli.checkpoint.convert.check import check

        with byte_progress() as report:
            checked = check(config.path, report)
    found = inspect(config.path)
    served = config.server and _serving(config.path, config.server)
    if config.as_json:
        values = asdict(found) | {"check": checked and asdict(checked), "for": served}
        typer.echo(json.dumps(values))
    else:
        _show(found)
        if checked:
            typer.echo(
                f"checked: {checked.files} files and {checked.tensors} tensors are as written"
            )
        if served and not served["obstacles"]:
            typer.echo(f"{config.server} loads it as it is: {served['command']}")
    if served and served["obstacles"]:
        raise CheckpointError(
            f"{config.server} doesn't load {found.path} as it is: {'; '.join(served['obstacles'])}",
            "see `glm3 convert mg2hf --help`",
        )


def _serving(path: "Path", server: "Server") -> dict[str, Any]:
    """Returns what keeps a program from loading a model, and the command with which it does."""
    from glm3cli.checkpoint.convert.serving import how_to_use, obstacles
    from glm3cli.checkpoint.locate import locate

    location = locate(path)
    return {
        "server": server,
        "obstacles": obstacles(location, server),
        "command": how_to_use(location.folder, server),
    }


script.register(app)


def _convert(config: ConvertConfig, options: "ConvertOptions") -> None:
    """Converts a model and prints the result; shared by hf2mg, mg2hf and mg2mg."""
    from glm3cli.checkpoint.convert.preflight import check_request
    from glm3cli.host.imports import large_imports
    from glm3cli.host.signals import stopped_by_sigterm

    with stopped_by_sigterm("the conversion", "nothing half-written is left; run it again"):
        check_request(config.source, config.target, options)
        # Huge pages for torch's tensors: cuts and joins get their memory twice as fast.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        # After the checks: importing torch takes a second.
        with large_imports():
            from glm3cli.checkpoint.convert.convert import convert

        with byte_progress() as report:
            result = convert(config.source, config.target, options, report)
    if config.as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    checked = "read back and compared" if result.verified else "not verified"
    if result.logits_difference is not None:
        checked += f", logits within {result.logits_difference:.1e} of the source's"
    if result.logits_difference == 0:
        checked = "read back and compared, same logits"
    typer.echo(
        f"{result.target}: {result.layout}, {result.tensors} tensors, {result.bytes / 1e9:.2f} GB "
        f"in {result.seconds:.1f} s, {checked}"
    )


def _origin(manifest: dict[str, Any]) -> str:
    """Returns a sentence about where a folder comes from, according to its manifest."""
    settings = {name: value for name, value in manifest["settings"].items() if value is not None}
    source, checked = manifest["source"], "read back" if manifest["verified"] else "not verified"
    if "run" in source:
        return f"saved by the training {source['run']} with glm3 {manifest['versions']['glm3']}"
    return (
        f"converted from {source['path']} ({source['layout']}) by glm3 "
        f"{manifest['versions']['glm3']} with "
        f"{', '.join(f'{name} {value}' for name, value in settings.items())}; {checked}"
    )


def _show(found: "Inspection") -> None:
    """Prints a table of what a folder holds, where it comes from, and what is wrong with it."""
    from rich.console import Console
    from rich.table import Column, Table

    stages = f" ({found.layers_per_stage} layers)" if found.layers_per_stage else ""
    console = Console()
    console.print(
        f"{found.path}\nlayout {found.layout}, tp {found.tp}, pp {found.pp}{stages}, "
        f"vpp {found.vpp}, iteration {'-' if found.iteration is None else found.iteration}, "
        f"{found.parameters:,} parameters, {found.bytes:,} bytes",
        highlight=False,
    )
    table = Table(Column("tensor", overflow="fold"), "shape", "dtype", "count")
    for kind in found.kinds:
        table.add_row(kind.name, str(list(kind.shape)), kind.dtype, str(kind.count))
    console.print(table)
    for adapter in found.adapters:
        console.print(f"with the adapter {adapter}", markup=False, highlight=False, soft_wrap=True)
    if found.manifest:
        console.print(_origin(found.manifest), markup=False, highlight=False, soft_wrap=True)
    if found.unused:
        console.print(f"without use for glm3: {', '.join(found.unused)}", highlight=False)
    for problem in found.problems:
        console.print(problem, style="red", markup=False)
