"""`trl-emguard COMMAND …`: the same commands as `python -m trl_emguard.scripts.COMMAND …`."""

import argparse
import sys
from importlib import import_module

from .quiet import leave_out_noise


COMMANDS = {
    "sft": "supervised fine-tuning, defended by --defense",
    "evaluate": "measure what training changed: broad, narrow, benign, coherent",
    "compare": "train and evaluate several defenses, and write one report",
    "persona": "make, inspect and use persona vectors",
    "score": "score a pool of safe rows by its perplexity gap",
    "select": "choose rows of a scored pool for interleaving",
    "rescale": "multiply the update of a LoRA adapter by a factor",
    "project": "project a LoRA adapter onto its model's alignment (SafeLoRA)",
    "model": "make a shipped model if it is missing, and print its path",
    "recipes": "print the folder of the recipes that came with the package",
    "demo": "train undefended and defended on a real model, and compare",
}


def main(argv: list[str] | None = None) -> int:
    is_command = argv is None
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="trl-emguard",
        description="In-training defenses against emergent misalignment, for TRL.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items()),
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    # The arguments after the command's name, also `--help`, are left to that command's own parser.
    args = parser.parse_args(argv[:1])
    leave_out_noise(args.command)
    # A training may take the place of this process, unless Python code has called this function and then goes on.
    more = {"is_command": is_command} if args.command == "sft" else {}
    return import_module(f".{args.command}", __package__).main(argv[1:], **more) or 0


if __name__ == "__main__":
    sys.exit(main())
