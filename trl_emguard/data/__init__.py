"""The shipped data sets, and rows read from wherever a recipe points."""

from .load import DATA_DIR, SHIPPED, as_rows, load_rows, read_jsonl, read_parquet


__all__ = ["DATA_DIR", "SHIPPED", "as_rows", "load_rows", "read_jsonl", "read_parquet"]
