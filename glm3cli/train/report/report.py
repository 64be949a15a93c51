"""Makes RUN/report.html: curves, events, settings, data, and versions of a run on one page.

It is made of RUN/metrics.jsonl and RUN/run.yaml alone, and so can be made again at any time. The
page loads nothing: style, script, and drawings are in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from glm3cli.device import PACKAGES
from glm3cli.host.files import write_text
from glm3cli.train.progress.phases import STEP_PHASES
from glm3cli.train.report.charts import Axis, Chart, Curve, number
from glm3cli.train.report.history import Event, History

MAX_EVENTS = 500
MARKED = ("start", "resume", "save", "skip", "rollback", "signal", "stop")


def write_report(run: Path, history: History | None = None) -> Path:
    """Writes the page of a run and returns its path; an old page is replaced in one go.

    Args:
        run: The folder of the run.
        history: The content of its metrics.jsonl; None reads that file.

    Raises:
        OSError: A file can't be read or written.
    """
    settings_file = run / "run.yaml"
    settings = yaml.safe_load(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
    file = run / "report.html"
    history = history or History.read(run / "metrics.jsonl")
    page = build_report(run.resolve().name, history, settings)
    write_text(file, page)
    return file


def build_report(name: str, history: History, settings: Mapping[str, Any]) -> str:
    """Returns the page as text.

    Args:
        name: The title.
        history: The steps, validations, and events of the run.
        settings: The content of run.yaml.
    """
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    start = history.last_event("start")
    details = start.details if start else {}
    return Template(template).substitute(
        name=escape(name),
        about=escape(_about(details)),
        status=_status(history, settings),
        tiles=_tiles(history, settings),
        phases=_phases(history),
        kinds=_kinds(history.events),
        charts=_charts(history),
        sources=_sources(details.get("sources", [])),
        events=_events(history.events),
        settings=_pairs(settings.items()),
        versions=_pairs((key, details[key]) for key in ("glm3", *PACKAGES) if key in details),
    )


def _about(start: Mapping[str, Any]) -> str:
    """Returns the line below the title: the command, the model's size, and the parallel sizes.

    Args:
        start: The details of the last `start` event; empty if there is none.
    """
    if "parameters" not in start:
        return ""
    sizes = " x ".join(
        f"{axis} {start[axis]}" for axis in ("tp", "cp", "pp", "dp") if axis in start
    )
    return f"{start.get('command', '')} of {start['parameters']:,} parameters on {sizes}"


def _status(history: History, settings: Mapping[str, Any]) -> str:
    """Returns how the run has ended since its last start, as HTML."""
    last_start = max((i for i, e in enumerate(history.events) if e.kind == "start"), default=0)
    since = {event.kind: event for event in history.events[last_start:]}
    stop, signal = since.get("stop"), since.get("signal")
    if signal is not None:
        word, text = "bad", f"stopped by {_what_stopped(signal.details)}"
    elif stop is None:
        word, text = "open", "not finished"
    elif "early_stop" in since:
        word, text = "good", "finished by --early-stop"
    elif stop.iteration >= settings.get("train_iters", 0):
        word, text = "good", "finished"
    else:
        word, text = "bad", "stopped early"
    return f'<span class="status {word}">{escape(text)}</span>'


def _what_stopped(signal: Mapping[str, Any]) -> str:
    """Returns what stopped a run: a signal by its number, or `--exit-duration`.

    Args:
        signal: The details of the `signal` event; its `number` is 0 for `--exit-duration`.
    """
    number = signal.get("number", "")
    return str(signal.get("name", "")) if number == 0 else f"signal {number}"


def _tiles(history: History, settings: Mapping[str, Any]) -> str:
    """Returns the newest numbers of the run as HTML; those that it doesn't have are left out."""
    steps = history.steps
    last = steps.last
    memory = last("peak_memory_bytes")
    tiles = {
        "step": _of(steps.iterations[-1] if steps else 0, settings.get("train_iters")),
        "loss": _formatted(last("loss"), "{:.4f}"),
        "validation loss": _formatted(history.validations.last("validation_loss"), "{:.4f}"),
        "tokens": _formatted(last("consumed_tokens")),
        "tokens/s/device": _formatted(last("tokens_per_second_per_device")),
        "TFLOP/s/device": _formatted(last("tflops_per_device")),
        "MFU full": _formatted(last("mfu"), "{:.1%}"),
        "MFU causal": _formatted(last("mfu_causal"), "{:.1%}"),
        "peak memory": _formatted(memory and memory / 2**30, "{:.2f} GiB"),
        "time in steps": _duration(steps.total("step_time")),
    }
    return "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in tiles.items()
        if value is not None
    )


def _of(done: int, of: Any) -> str:
    """Returns the number of steps done, and the number of all steps if it is known."""
    return f"{done:,}" if of is None else f"{done:,} / {of:,}"


def _formatted(value: float | None, form: str = "") -> str | None:
    """Returns a number in the format `form`, or in four digits without; None stays None."""
    if value is None:
        return None
    return form.format(value) if form else number(value)


def _duration(seconds: float) -> str:
    """Returns a time in hours and minutes, minutes and seconds, or seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"


def _phases(history: History) -> str:
    """Returns the share of each phase in the time of all steps, as a bar in HTML."""
    seconds = {phase: history.steps.total(f"{phase}_time") for phase in STEP_PHASES}
    together = sum(seconds.values())
    if not together:
        return ""
    parts, keys = [], []
    for index, (phase, spent) in enumerate(seconds.items()):
        label = f"{phase.replace('_', ' ')} {spent / together:.1%}"
        parts.append(f'<i class="p{index}" style="width:{spent / together:.2%}"></i>')
        keys.append(f'<span class="key p{index}">{escape(label)}</span>')
    return f'<div class="bar">{"".join(parts)}</div><p class="keys">{"".join(keys)}</p>'


def _charts(history: History) -> str:
    """Returns the charts as HTML."""
    steps, validations = history.steps, history.validations
    everything = [*steps.iterations[:1], *steps.iterations[-1:], *validations.iterations]
    if not everything:
        return '<p class="none">No step yet.</p>'
    iterations = Axis(min(everything) - 1, max(everything))  # where the first step starts
    return "".join(chart.html(iterations) for chart in _all_charts(history))


def _all_charts(history: History) -> list[Chart]:
    """Returns the charts to draw; a loss scale that stays and an MFU that isn't known have none."""
    validations = history.validations
    marks = [event for event in history.events if event.kind in MARKED]

    def curve(column: str, name: str = "", scale: float = 1.0) -> Curve:
        values = history.steps.columns[column]
        if scale != 1.0:
            values = [None if value is None else value * scale for value in values]
        return Curve(name, history.steps.iterations, values)

    losses = [curve("loss", "training")]
    if validations:
        values = validations.columns["validation_loss"]
        losses.append(Curve("validation", validations.iterations, values))
    charts = [
        Chart("Loss", losses, from_zero=False, marks=marks),
        Chart("Learning rate", [curve("lr")], marks=marks),
        Chart("Gradient norm", [curve("grad_norm")], may_log=True, marks=marks),
        Chart("Tokens per second", [curve("tokens_per_second")], marks=marks),
        Chart("Peak memory, GiB", [curve("peak_memory_bytes", scale=2.0**-30)], marks=marks),
    ]
    if history.steps.last("mfu") is not None:
        shares = [curve("mfu", "full", 100.0), curve("mfu_causal", "causal", 100.0)]
        charts.append(Chart("MFU, %", shares, marks=marks))
    if len(set(history.steps.columns["loss_scale"])) > 1:
        charts.append(Chart("Loss scale", [curve("loss_scale")], may_log=True, marks=marks))
    return charts + _charts_of_means(history, marks)


def _charts_of_means(history: History, marks: list[Event]) -> list[Chart]:
    """Returns a chart for each group of the means that the objective reports, GROUP/NAME."""
    groups: dict[str, list[Curve]] = {}
    for series, prefix in ((history.steps, ""), (history.validations, "validation_")):
        for column, values in series.columns.items():
            group, slash, name = column.removeprefix(prefix).partition("/")
            if slash:
                label = f"{name}, validation" if prefix else name
                groups.setdefault(group, []).append(Curve(label, series.iterations, values))
    return [
        Chart(group.replace("_", " ").capitalize(), curves, from_zero=False, marks=marks)
        for group, curves in groups.items()
    ]


def _kinds(events: Sequence[Event]) -> str:
    """Returns the legend of the events that are marked on the charts, as HTML."""
    kinds = {event.kind for event in events}
    return "".join(f'<span class="key {kind}">{kind}</span>' for kind in MARKED if kind in kinds)


def _events(events: Sequence[Event]) -> str:
    """Returns a table of the last MAX_EVENTS events, the newest first, as HTML."""
    rows = [
        [_moment(event.time), str(event.iteration), event.kind, _details(event.details)]
        for event in reversed(events[-MAX_EVENTS:])
    ]
    left = len(events) - len(rows)
    more = f"<p>{left:,} earlier ones are in metrics.jsonl.</p>" if left else ""
    return _table(["time", "step", "event", "details"], rows) + more


def _details(details: Mapping[str, Any]) -> str:
    """Returns the details of an event as text, without lists, mappings, and the iteration."""
    short = {k: v for k, v in details.items() if not isinstance(v, list | dict)}
    return ", ".join(f"{key} {value}" for key, value in short.items() if key != "iteration")


def _moment(time: float | None) -> str:
    """Returns a time in seconds since 1970 as local date and time; an empty text for None."""
    return "" if time is None else datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the data sets as HTML.

    Args:
        sources: The data sets, as the `start` event lists them.
    """
    head = ["data", "weight", "documents", "tokens", "samples", "epochs"]
    rows = [
        [
            str(source["prefix"]),
            f"{source['weight']:.2%}",
            *(f"{source[key]:,}" for key in ("documents", "tokens", "samples")),
            f"{source['epochs']:.2f}",
        ]
        for source in sources
    ]
    return _table(head, rows)


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    """Returns a table of names and values as HTML."""
    return _table([], [[key, _value(value)] for key, value in pairs])


def _value(value: Any) -> str:
    """Returns a value as text; the items of a list with commas between them."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table as HTML, whose cells are escaped; "None." if it has no rows.

    Args:
        head: The names of the columns; empty for a table without a head.
        rows: The cells of each row.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>" if body else '<p class="none">None.</p>'
