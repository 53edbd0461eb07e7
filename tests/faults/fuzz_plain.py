"""Naive readers that several formats share: the standard library, numpy and plain PyYAML."""

import json
import math
from typing import Any

import numpy as np
import yaml


def strict_json(text: bytes) -> Any:
    """Read standard JSON in UTF-8; a key that is given twice is an error."""

    def pairs(items):
        assert len({key for key, _ in items}) == len(items)
        return dict(items)

    value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_floats(raw: bytes, dtype: str) -> np.ndarray:
    """Read little-endian floats of a safetensors dtype as fp32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F32": "<f4", "F64": "<f8", "F16": "<f2"}[dtype]).astype("<f4")


def naive_yaml(content: bytes) -> Any:
    """Read YAML by its plain safe loader."""
    return yaml.safe_load(content.decode("utf-8"))


def plain(value: Any) -> Any:
    """Return a value as an Arrow table has it: no null in a dict, one kind of list and of NaN."""
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items() if child is not None}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return value
