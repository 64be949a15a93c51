"""`glm3 doctor`: shows hardware, drivers, versions and settings, and what doesn't fit together.

`device.doctor` finds all of this out, and `numerics` whether the device computes what it should;
this module prints it. The exit code is 4 if something is wrong.
"""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from glm3cli.cli.epilogs import DOCTOR
from glm3cli.cli.options import command
from glm3cli.config.doctor import DoctorConfig
from glm3cli.errors import DeviceError
from glm3cli.parallel.launch import is_speaker, run_here

if TYPE_CHECKING:
    from glm3cli.numerics.run import Report
    from glm3cli.numerics.speed import Speeds

_STYLES = {"ok": "green", "absent": "dim", "untried": "yellow", "wrong": "red"}


def register(app: typer.Typer) -> None:
    """Adds the command `doctor` to `app`."""

    @command(app, DoctorConfig, "doctor", epilog=DOCTOR)
    def doctor(config: DoctorConfig) -> None:
        """Show hardware, drivers, and versions, and what doesn't fit together.

        With --numerics, run the device's operators instead, and see whether they are right.
        """
        if config.numerics:
            _examine(config)
            return
        from glm3cli.device import DEVICES, find
        from glm3cli.device.doctor.diagnose import diagnose

        findings = diagnose()
        device = DEVICES[find()]
        problems = sum(finding.verdict == "wrong" for finding in findings)
        if config.as_json:
            report = [asdict(finding) for finding in findings]
            typer.echo(json.dumps({"device": device.name, "findings": report}))
        else:
            _print(device.name, device.backend, [asdict(finding) for finding in findings])
        if problems:
            sys.exit(4)


def _print(device: str, backend: str, findings: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"--device auto is {device}, with {backend}")
    for heading in ("", "found", ""):
        table.add_column(heading)
    for row in findings:
        verdict = Text(row["verdict"], style=_STYLES[row["verdict"]])
        table.add_row(Text(row["subject"]), Text(row["found"]), verdict)
    Console().print(table)
    # Below the table, where nothing is broken into lines: a way out can be copied.
    for row in filter(lambda row: row["why"], findings):
        typer.echo(f"{row['verdict']}: {row['why']}\n    {row['advice']}")


def _examine(config: DoctorConfig) -> None:
    """Runs the self-test on this machine's device, and prints its report.

    Raises:
        DeviceError: The device can't be used, or a check failed.
    """
    if not run_here(config):
        return
    from glm3cli.numerics.run import run_numerics

    def say(line: str) -> None:
        if is_speaker():
            typer.echo(f"checking {line}", err=True)

    report = run_numerics(config, say)
    if not is_speaker():
        return
    if config.as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _print_checks(report)
    if report.failures:
        raise DeviceError(
            f"{len(report.failures)} of {len(report.outcomes)} checks failed",
            "do without what is wrong, as the sentence about each says",
        )


def _print_checks(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{report.num_ranks} x {report.chip} ({report.device}) against fp64 on the host"
    table = Table(title=title)
    for heading in ("", "type", "largest error", "limit", ""):
        table.add_column(heading)
    for one in report.outcomes:
        verdict = Text("ok", style="green") if one.ok else Text("wrong", style="red")
        error, limit = f"{one.error:.2g}", f"{one.limit:.2g}"
        table.add_row(Text(one.subject), Text(one.dtype), Text(error), Text(limit), verdict)
    Console().print(table)
    for one in report.failures:
        typer.echo(f"wrong: {one.sentence}")
    if not report.failures:
        typer.echo(f"all of {len(report.outcomes)} checks passed")
    if report.speeds is not None:
        typer.echo(_speeds(report.speeds))


def _speeds(speeds: "Speeds") -> str:
    """Returns what was measured as a line of text."""
    line = (
        f"measured: {speeds.matrix / 1e12:.3g} TFLOP/s in matrix products and "
        f"{speeds.attention / 1e12:.3g} in attention, memory {speeds.memory / 1e9:.3g} GB/s, "
        f"{speeds.launch * 1e6:.3g} us an operator"
    )
    if not speeds.link:
        return line
    return f"{line}, links {speeds.link / 1e9:.3g} GB/s, {speeds.latency * 1e6:.3g} us a message"
