"""Choice of rows by the value in a column, and count of the rows whose label columns mark the answer as harmful."""

from datasets import Dataset


# Column → values, in lower case, that mark a row's answer as harmful. Columns that label prompts are left out, because
# an answer that refuses a harmful prompt is safe.
HARMFUL = {
    "response_harm_label": ("harmful",),  # from the data set WildGuardMix
    "harm_label": ("harmful",),
    "response_label": ("harmful", "unsafe"),  # from the data set Aegis
    "is_safe": ("false", "0", "0.0", "unsafe"),  # from the data set BeaverTails
    "is_response_safe": ("false", "0", "0.0"),
    "response_is_safe": ("false", "0", "0.0"),
    "is_harmful": ("true", "1", "1.0", "harmful"),
    "is_response_harmful": ("true", "1", "1.0"),
    "harmful": ("true", "1", "1.0"),
    "unsafe": ("true", "1", "1.0"),
    "safety": ("unsafe", "harmful"),
    "safety_label": ("unsafe", "harmful"),
    "is_misaligned": ("true", "1", "1.0"),
    "misaligned": ("true", "1", "1.0"),
}


def keep_where(rows: Dataset, condition: str, option: str = "--where") -> Dataset:
    """Return the rows that meet a condition `COLUMN=VALUE`. Values are compared as text; a null meets no condition.

    Args:
        rows: rows to choose from.
        condition: text `COLUMN=VALUE`.
        option: name of the option that gives the condition, for messages.

    Raises:
        ValueError: the condition has no `=`, the column is unknown, or no row has the value.
    """
    column, equals, wanted = condition.partition("=")
    if not equals:
        raise ValueError(f"{option}={condition} must be COLUMN=VALUE.")
    if column not in rows.column_names:
        raise ValueError(
            f"{option}={condition}: the pool has no column {column!r}, but {', '.join(rows.column_names)}."
        )
    values = [None if value is None else str(value) for value in rows.with_format(None)[column]]
    kept = [i for i, value in enumerate(values) if value == wanted]
    if not kept:
        found = sorted({value[:40] for value in values if value is not None})[:5]
        raise ValueError(
            f"{option}={condition}: no row has this value. There are {', '.join(map(repr, found)) or 'only nulls'} …."
        )
    return rows.select(kept)


def count_harmful(rows: Dataset) -> dict[str, tuple[int, list[str]]]:
    """Count the rows that each known column of labels marks as harmful. Columns that mark no row are left out.

    Returns:
        Name of the column → number of rows that it labels as harmful, and up to five of its labels that do not mean
        harmful.
    """
    found = {}
    for column in HARMFUL.keys() & set(rows.column_names):
        values = [str(value) for value in rows.with_format(None)[column] if value is not None]
        harmful = sum(value.lower() in HARMFUL[column] for value in values)
        if harmful:
            found[column] = (harmful, sorted({value for value in values if value.lower() not in HARMFUL[column]})[:5])
    return found
