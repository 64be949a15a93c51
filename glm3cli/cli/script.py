"""`glm3 convert script`: shows what a shell script of ModelLink amounts to in glm3."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from glm3cli.cli.epilogs import SCRIPT
from glm3cli.cli.options import command
from glm3cli.config.convert import ScriptConfig
from glm3cli.errors import ConfigError

if TYPE_CHECKING:
    from glm3cli.config.scripts.translation import Translation

_OUTCOMES = ("taken over", "needless here", "not supported")
_WIDTH = 40  # of a flag and its value, beside what became of it


def register(app: typer.Typer) -> None:
    """Adds `script` to `app`."""

    @command(app, ScriptConfig, "script", epilog=SCRIPT)
    def script(config: ScriptConfig) -> None:
        """Translate a shell script of ModelLink or MindSpeed-LLM into a run.yaml, or a command."""
        from glm3cli.config.scripts.translate import translate
        from glm3cli.host.files import write_text

        found, notes = translate(config.script, config.arguments, config.values)
        if config.number is not None:
            if config.number > len(found):
                raise ConfigError(
                    f"--number {config.number}: {config.script} starts {len(found)} program(s)",
                    f"give a number up to {len(found)}",
                )
            found = found[config.number - 1 : config.number]
        if config.as_json:
            commands = [asdict(one) for one in found]
            text = json.dumps({"commands": commands, "notes": notes}, ensure_ascii=False) + "\n"
        else:
            parts = ["\n".join(_lines(one, notes)) for one in found]
            text = "\n---\n".join(parts) + "\n"
        for sentence in [*notes, *(note for one in found for note in one.notes)]:
            typer.echo(f"note: {sentence}", err=True)
        for fate in (fate for one in found for fate in one.fates):
            if fate.outcome == _OUTCOMES[2]:
                typer.echo(f"not supported: {fate.flag} {fate.value}: {fate.text}", err=True)
        if len(found) > 1 and not config.as_json:
            typer.echo(f"{len(found)} commands, divided by ---: --number chooses one", err=True)
        if config.output is None:
            typer.echo(text, nl=False)
        else:
            write_text(config.output, text)


def _lines(found: "Translation", notes: list[str]) -> Iterator[str]:
    """Yields a run.yaml, or a command line, with what became of each flag as comments."""
    import yaml

    yield f"# {found.program}, line {found.line}"
    words = ["glm3", *found.command]
    if found.arguments:
        options = (
            part
            for name, value in found.options.items()
            for part in (f"--{name.replace('_', '-')}", str(value))
        )
        yield shlex.join([*words, *found.arguments, *options])
    else:
        yield f"# {_start(found)}"
        yield yaml.safe_dump(found.options, sort_keys=False, allow_unicode=True).rstrip()
    for outcome in _OUTCOMES:
        fates = [fate for fate in found.fates if fate.outcome == outcome]
        if fates:
            yield f"#\n# {outcome}:"
        for fate in fates:
            yield f"#   {f'{fate.flag} {fate.value}'.strip():{_WIDTH}} {fate.text}"
    if found.notes or notes:
        yield "#\n# notes:"
    yield from (f"#   {sentence}" for sentence in [*notes, *found.notes])


def _start(found: "Translation") -> str:
    """Returns the command that takes the run.yaml, on one machine or several."""
    line = f"{' '.join(found.command)} --config run.yaml"
    if found.nodes == 1:
        return f"glm3 {line}"
    return (
        f"torchrun --nnodes {found.nodes} --nproc_per_node N --rdzv-backend c10d "
        f"--rdzv-endpoint HOST:29500 -m glm3cli {line}"
    )
