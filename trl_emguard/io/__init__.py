"""Files, parsers and folders, without torch."""
