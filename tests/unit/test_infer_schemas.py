"""Calls and answers by JSON schemas: what is allowed, what is not, and what is refused in words."""

import functools
from typing import Any

import pytest

from glm3cli.errors import ConfigError
from glm3cli.infer.decoding.grammar import Grammar, from_lark, from_schema, read_grammar
from glm3cli.infer.serve.protocol.called import call_grammar
from glm3cli.infer.serve.protocol.errors import ApiError
from tests.support.exam import exam_tokenizer

TOKENIZER = exam_tokenizer()
WHOLE = {"type": "integer"}
DEEP: dict[str, Any] = functools.reduce(lambda inner, _: {"items": inner}, range(400), {})


def accepts(grammar: str, text: str) -> bool:
    """Returns whether a grammar allows a text, token by token up to an end."""
    matcher = Grammar(grammar, TOKENIZER, TOKENIZER.ends).begin()
    ids = TOKENIZER.encode(f"\n{text}")[len(TOKENIZER.encode("\n")) :]
    steps = [*ids, TOKENIZER.ends[0]]
    return all(bool(matcher.allowed(ids[:k])[token]) for k, token in enumerate(steps))


def calls(parameters: dict[str, Any], *arguments: str) -> list[bool]:
    """Returns which arguments a call in ChatGLM3's form may have."""
    grammar = from_lark(call_grammar({"f": {"parameters": parameters}}, "python"), "tools")
    return [accepts(grammar, f"f\n```python\ntool_call({one})\n```") for one in arguments]


def test_references_lead_to_the_schema_of_all_parameters() -> None:
    node = {
        "type": "object",
        "properties": {"value": WHOLE, "next": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["value"],
    }
    right = ("value=1", 'value=1, next=[{"value":2,"next":[{"value":3}]}]')
    wrong = ("value=1, next=[[]]", 'value=1, next=[{"value":"2"}]', 'value=1, next=[{"next":[]}]')
    assert calls(node, *right, *wrong) == [True, True, False, False, False]
    # As pydantic writes a class that refers to itself: the parameters are a reference, too.
    named = {**node, "properties": {**node["properties"], "next": {"$ref": "#/$defs/Node"}}}
    held = {"$ref": "#/$defs/Node", "$defs": {"Node": named}}
    assert calls(held, "value=1", 'value=1, next={"value":2}', 'value=1, next={"value":""}') == [
        True,
        True,
        False,
    ]
    # A reference to another parameter; a property of that name is none, and no more is a constant.
    pair = {"properties": {"$ref": WHOLE, "c": {"const": {"$ref": "#"}}}, "required": ["$ref"]}
    both = {"a": {"type": "object", **pair}, "b": {"$ref": "#/properties/a"}}
    draft = "http://json-schema.org/draft-07/schema#"
    other = {"$schema": draft, "$id": "x", "properties": both, "required": ["a", "b"]}
    value, constant = '{"$ref":1}', '{"$ref":1,"c":{"$ref":"#"}}'
    assert calls(other, f"a={value}, b={value}", f"a={value}, b={constant}", f"a={value}, b=1") == [
        True,
        True,
        False,
    ]


def test_which_arguments_there_are() -> None:
    closed = {"properties": {}, "additionalProperties": False}
    assert calls(closed, "", "a=1") == [True, False]
    assert calls({"properties": {}}, "", "a=1, b='x'") == [True, False]
    assert calls({"additionalProperties": WHOLE}, "", "a=1, b=2", 'a="x"') == [True, True, False]
    asked = {"properties": {"a": WHOLE}, "required": ["b"]}
    assert calls(asked, 'a=1, b="x"', "b=3", "a=1") == [True, True, False]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"allOf": [{"properties": {"a": WHOLE}}]}, "have allOf beside their properties"),
        ({"properties": {"a": WHOLE}, "anyOf": [{"required": ["a"]}]}, "have anyOf beside"),
        ({"required": ["a"], "additionalProperties": False}, "requires the argument 'a' and forb"),
        ({"$ref": "#/$defs/x"}, "'#/\\$defs/x' leads to nothing"),
        ({"$ref": "#"}, "'#' leads in a circle"),
        ({"$ref": "https://x/y"}, "leads out of the schema"),
        ({"properties": {"a": DEEP}}, "nested too deeply"),
    ],
)
def test_parameters_that_no_call_can_follow(parameters: Any, sentence: str) -> None:
    with pytest.raises(ApiError, match=sentence):
        call_grammar({"f": {"parameters": parameters}}, "python")


def test_unknown_formats_are_annotations() -> None:
    schema = {"properties": {"format": {"type": "string", "format": "x"}}, "required": ["format"]}
    grammar = from_schema(schema, "schema")
    assert accepts(grammar, '{"format":"one two"}')
    assert not accepts(grammar, '{"format":1}')
    assert not accepts(from_schema({"type": "string", "format": "date"}, "schema"), '"one"')
    assert calls(schema, "format='one'", "format=1") == [True, False]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: read_grammar(None, "a(?=b)"), "look-around, including look-ahead"),
        (lambda: read_grammar(None, r"(a)\1"), "backreferences are not supported"),
        (lambda: from_schema({"pattern": "(?!a)", "type": "string"}, "s"), "look-around, incl"),
        (lambda: from_schema({"oneOf": [WHOLE, {"type": "number"}]}, "s"), "write anyOf$"),
        (lambda: from_schema(DEEP, "s"), "s: it is nested too deeply"),
        (lambda: from_lark('start: "a" %json {"not": {}}', "s"), r"^s: .*Unimplemented.*not"),
    ],
)
def test_what_llguidance_says_is_kept(make: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as told:
        make()
    assert "at 1(8)" not in told.value.message
    assert "coerce" not in told.value.message
