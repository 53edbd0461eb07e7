"""Text from models and files, made safe for a terminal."""

from rich.markup import escape


def visible(text: str) -> str:
    """Return a text whose control characters and marks of direction are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """Return a text for rich to print as it is, where rich reads markup."""
    return escape(visible(text))
