"""Rows: the shipped data sets, files of rows, and conversations in rows."""

from .load import DATA_DIR, SHIPPED, as_rows, load_rows, read_jsonl, read_parquet


__all__ = ["DATA_DIR", "SHIPPED", "as_rows", "load_rows", "read_jsonl", "read_parquet"]
