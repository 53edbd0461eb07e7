"""Text from models and files, made safe for a terminal."""

from rich.markup import escape


def printable(text: str) -> str:
    """Return a text for rich to print as it is: markup, control characters and marks of direction are escaped."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
