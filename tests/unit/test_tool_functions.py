"""The functions of a Python file as tools: what the model is shown, and what it gets back."""

from pathlib import Path

from glm3cli.data.tokens.messages import ToolCall
from glm3cli.infer.chat.functions import describe_functions
from glm3cli.infer.chat.toolbox import read_tools

FILE = '''
import math
from typing import Literal, Optional

def search(query: str, limit: int = 3, *, kind: "Literal['news', 'books']", deep: bool = False):
    """Searches the web
    for pages.

    It takes a while.

    Args:
        query: What to look for,
            in any language.
        limit (int): How many.

    Returns:
        The pages.
    """
    return f"{limit} pages about {query}"

def mean(values: list[float], weights: Optional[dict] = None, by: "str | None" = None, other=3):
    return math.fsum(values) / len(values)

def _helper(): ...

class Shown: ...
'''


def test_a_function_is_described_by_its_signature_and_docstring(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(FILE)
    search, mean = describe_functions(tmp_path / "tools.py")
    assert search == {
        "name": "search",
        "description": "Searches the web for pages.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"description": "What to look for, in any language.", "type": "string"},
                "limit": {"description": "How many.", "type": "integer"},
                "kind": {"enum": ["news", "books"]},
                "deep": {"type": "boolean"},
            },
            "required": ["query", "kind"],
        },
    }
    assert mean["description"] == ""
    assert mean["parameters"] == {
        "type": "object",
        "properties": {
            "values": {"type": "array", "items": {"type": "number"}},
            "weights": {"type": "object"},
            "by": {"type": "string"},
            "other": {},
        },
        "required": ["values"],
    }


def test_what_a_function_returns_or_raises_becomes_text(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(FILE)
    box = read_tools(tmp_path / "tools.py", may_run=True)
    assert box.run(ToolCall("search", {"query": "湖", "kind": "news"})) == "3 pages about 湖"
    assert box.run(ToolCall("mean", {"values": [1, 2]})) == "1.5"
    failed = box.run(ToolCall("mean", {"values": []}))
    assert failed == "Error: ZeroDivisionError: float division by zero"
    assert "unexpected keyword argument 'x'" in box.run(ToolCall("mean", {"values": [], "x": 1}))
