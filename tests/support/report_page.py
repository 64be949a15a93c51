"""Reads a report.html as a browser would, without one."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_VOID = {"meta", "br", "link", "img", "input"}


@dataclass
class Page(HTMLParser):
    """What is in a page.

    Attributes:
        charts: The numbers of the curves by the chart's title.
        paths: Classes and outlines of the drawings' paths by the chart's title.
        tags: Every tag with its attributes.
        questions: The questions of an evaluation's page.
    """

    text: str = ""
    charts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    paths: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open_tags: list[str] = field(default_factory=list)
    title: str = ""
    questions: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag not in _VOID:
            self.open_tags.append(tag)
        if tag == "svg":
            self.title = str(values["aria-label"])
        if tag == "path":
            entry = (str(values["class"]), str(values["d"]))
            self.paths.setdefault(self.title, []).append(entry)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags, f"</{tag}> without a start"
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open_tags[-1] if self.open_tags else ""
        if inside == "script" and data.startswith("{"):
            self.charts[self.title] = json.loads(data)["curves"]
        elif inside == "script" and data.startswith("["):
            self.questions = json.loads(data)
        elif inside not in ("script", "style"):
            self.text += data + "\n"


def parse_page(text: str) -> Page:
    """A page from its text; fails where tags don't match."""
    page = Page()
    page.feed(text)
    page.close()
    assert page.open_tags == []
    return page


def read_page(file: Path) -> Page:
    """A page from its file."""
    return parse_page(file.read_text("utf-8"))
