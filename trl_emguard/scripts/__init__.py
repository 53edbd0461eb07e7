"""Commands of the package, one file each. No other part of the package parses command lines."""
