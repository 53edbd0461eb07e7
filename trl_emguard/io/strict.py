"""Strict parsers of JSON and YAML for damaged or hostile files: they return plain data or raise `ValueError`.

The standard parsers keep the last of two equal keys silently, and raise many types of errors on bad input.
"""

import json
from collections.abc import Iterable
from typing import Any

import yaml


# Limit on the size of a YAML text after its aliases are expanded: the UTF-8 bytes of all scalars, plus 1 for each
# scalar, list and mapping. A few nested aliases can expand to gigabytes.
MAX_EXPANDED = 10_000_000


def parse_json(text: str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: the text is not JSON, has a key twice or half a character (a lone surrogate), or nests too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # `encode` raises on a lone surrogate
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def parse_yaml(text: str) -> Any:
    """Parse YAML text into plain data. A tag that asks for a Python object, such as `!!python/object`, is an error.

    Raises:
        ValueError: the text is not YAML, has a key twice, nests too deeply, has a value that does not fit its tag, has
            a huge integer, or has aliases that expand beyond `MAX_EXPANDED`.
    """
    try:
        return yaml.load(text, _Loader)  # `_Loader` is a SafeLoader, so no tag runs code
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # PyYAML raises errors that are no `YAMLError` for values such as `!!int ""`, `!!bool x` or a date of month 13.
    except Exception as error:
        raise ValueError(f"a value is not of its type ({type(error).__name__}: {error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"the key {_twice(name for name, _ in pairs)!r} stands there twice: keep one of them")
    return value


def _twice(names: Iterable[str]) -> str | None:
    """Return the first name that occurs for a second time, or `None`."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that refuses a key given twice, integers from ±2⁶³ on, and texts larger than `MAX_EXPANDED`."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # id of a YAML node → its size, as `MAX_EXPANDED` counts it

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None:
            return node
        if is_alias:
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(
                    problem="an alias stands inside of what it names", problem_mark=node.start_mark
                )
            return node
        if isinstance(node, yaml.ScalarNode):
            size = 1 + len(node.value.encode("utf-8"))  # `encode` refuses half a character (a surrogate)
        else:
            pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
            size = 1 + sum(self._sizes[id(child)] for pair in pairs for child in pair)
        if size > MAX_EXPANDED:
            raise yaml.composer.ComposerError(problem="its aliases stand for too much", problem_mark=node.start_mark)
        self._sizes[id(node)] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        # The tag `!!map` may precede a node of another kind, which has no keys to check. The method of the parent
        # class refuses such a node.
        if isinstance(node, yaml.MappingNode):
            name = _twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if name is not None:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {name!r} stands there twice: keep one of them"
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        # Python cannot convert an integer of 400 digits to a float, and it refuses to print an integer of 5000 digits.
        # The limit of 64 bits keeps out all such integers.
        if abs(value) >= 2**63:
            raise yaml.constructor.ConstructorError(problem=f"the number {node.value[:40]!r} is too large")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
