"""Text from models and files, made safe for a terminal."""

from rich.markup import escape


def visible(text: str) -> str:
    """Return a text with its control characters and direction marks (such as right-to-left) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """Return a text with control characters and rich markup escaped, so that rich prints the text literally."""
    return escape(visible(text))
