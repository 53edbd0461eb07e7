"""One file per command. Only these parse arguments."""
