"""Reads JSON and YAML files as people and programs write them; a wrong one is a ValueError."""

import functools
import json
from pathlib import Path
from typing import Any

# What a plain word in YAML may be: nothing (`key:` or null), and << of mappings. Everything else is
# text, which an option reads by its own type: 10:12 would be 612 in YAML 1.1, and `no` false.
_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
# What a file may call a word itself, as in `!!float 1e-4`; it is text all the same.
_PLAIN = tuple(f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file, which may begin with a byte-order mark.

    Raises:
        OSError: The file can't be read.
        ValueError: It isn't UTF-8 or JSON, or is nested too deeply.
    """
    return parse_json(path.read_text("utf-8-sig"))


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: It isn't JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """Returns the value of a YAML file, in which every scalar is text or None.

    Raises:
        OSError: The file can't be read.
        ValueError: It isn't UTF-8 or YAML, has a key twice, or is nested too deeply.
    """
    import yaml

    try:
        return yaml.load(path.read_text("utf-8-sig"), _text_loader())
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@functools.cache
def _text_loader() -> Any:
    """Returns a loader of YAML that leaves scalars as text and refuses keys that come twice.

    In a merge (`<<: *base`) a mapping's own keys win, and then the first mapping that has a key.
    """
    import yaml  # 20 ms

    class TextLoader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            node.value = _merged(node.value)
            return node

    TextLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag in _PLAIN:
        TextLoader.add_constructor(tag, _text)
    return TextLoader


def _text(loader: Any, node: Any) -> Any:
    return loader.construct_scalar(node)


def _merged(pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Returns the pairs of a YAML mapping's nodes with those of the mappings that it merges.

    PyYAML's own merging isn't the same in all versions.

    Raises:
        ValueError: A key is there twice, or what is merged is no mapping.
    """
    own = [pair for pair in pairs if pair[0].tag != _MERGE]
    merged = {_name(key): (key, value) for key, value in own}
    for key, _ in own:
        if merged[_name(key)][0] is not key:
            line = key.start_mark.line + 1
            raise ValueError(f"the key {key.value!r} is given twice, at last in line {line}")
    for key, value in pairs:
        for base in _bases(value) if key.tag == _MERGE else []:
            for pair in base.value:
                merged.setdefault(_name(pair[0]), pair)
    return list(merged.values())


def _name(key: Any) -> Any:
    """Returns what tells the node of a key from those of other keys."""
    return (key.tag == _NULL, key.value) if key.id == "scalar" else id(key)


def _bases(merged: Any) -> list[Any]:
    """Returns the nodes of the mappings that stand behind `<<`, one or a list of them."""
    found = merged.value if merged.id == "sequence" else [merged]
    for base in found:
        if base.id != "mapping":
            line = base.start_mark.line + 1
            raise ValueError(f"<< in line {line} merges something else than mappings")
    return list(found)
