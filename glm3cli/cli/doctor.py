"""`glm3 doctor`: shows hardware, drivers, versions and settings, and what doesn't fit together.

`device.doctor` finds all of this out; this module prints it. The exit code is 4 if something is
wrong.
"""

import json
import sys
from dataclasses import asdict

import typer

from glm3cli.cli.options import command
from glm3cli.config.doctor import DoctorConfig

_STYLES = {"ok": "green", "absent": "dim", "untried": "yellow", "wrong": "red"}


def register(app: typer.Typer) -> None:
    """Adds the command `doctor` to `app`."""

    @command(app, DoctorConfig, "doctor")
    def doctor(config: DoctorConfig) -> None:
        """Show hardware, drivers, and versions, and what doesn't fit together."""
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
