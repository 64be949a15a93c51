"""Reads JSON and YAML files as people and programs write them; a wrong one is a ValueError."""

import functools
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

# What a plain word in YAML may be: nothing (`key:` or null), and << of mappings. Everything else is
# text, which an option reads by its own type: 10:12 would be 612 in YAML 1.1, and `no` false.
_KEPT_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


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
    """Returns a loader of YAML that leaves scalars as text and refuses keys that come twice."""
    import yaml  # 20 ms

    class TextLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if isinstance(name, Hashable) and name in seen and key.tag != _KEPT_TAGS[1]:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {name!r} is given twice", key.start_mark
                    )
                seen |= {name} if isinstance(name, Hashable) else set()
            return super().construct_mapping(node, deep=deep)

    TextLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return TextLoader
