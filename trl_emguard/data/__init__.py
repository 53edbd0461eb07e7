"""Rows to train and evaluate on: the shipped data sets, files of rows, and conversations made from rows."""

from .files import as_rows, read_jsonl, read_parquet
from .load import DATA_DIR, SHIPPED, load_rows


__all__ = ["DATA_DIR", "SHIPPED", "as_rows", "load_rows", "read_jsonl", "read_parquet"]
