"""Persona vectors: extract a vector from your model, inspect it, make a random control, measure an adapter's shift.

A persona vector has one direction per layer: the mean hidden state of answers that show a trait, minus the mean of
answers that show its opposite. The shift is how far an adapter moves the model's hidden states along the vector.

```bash
trl-emguard persona extract --model Qwen/Qwen2.5-7B-Instruct --trait evil --output evil.safetensors
trl-emguard persona inspect evil.safetensors
trl-emguard persona random --like evil.safetensors --output control.safetensors
trl-emguard persona project --model Qwen/Qwen2.5-7B-Instruct --adapter out --vector evil.safetensors
```
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..io.files import check_writable
from ..persona.extract import check_extraction, extract_vector
from ..persona.shift import check_layer, persona_shift
from ..persona.traits import SHIPPED_TRAITS, load_trait
from ..persona.vectors import SHIPPED_VECTORS, PersonaVector, load_vector, random_like
from .shared import RESUMES, name_adapters, run_command, to_path


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    interrupted = RESUMES if args.command == "extract" else "interrupted."
    return run_command(
        f"persona {args.command}", lambda: args.run(args, Console(width=100, markup=False)), interrupted
    )


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "trl-emguard persona", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    extract = command("extract", run_extract, "make the persona vector of a trait with your model")
    extract.add_argument("--model", required=True, help="model folder, hub id or shipped name")
    extract.add_argument("--trait", required=True, help=f"{', '.join(SHIPPED_TRAITS)}, or a YAML file")
    extract.add_argument("--output", required=True, type=to_path, help="the .safetensors file to write")
    extract.add_argument("--max_new_tokens", type=int, default=64, help="length of an answer (default: %(default)s)")
    extract.add_argument("--batch_size", type=int, default=40, help="answers generated at once (default: %(default)s)")
    extract.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    extract.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bf16 on a GPU, else fp32"
    )

    inspect = command("inspect", run_inspect, "print a vector's norms and separation per layer, and draw them")
    inspect.add_argument("vector", help=f"a file, or a shipped vector: {', '.join(SHIPPED_VECTORS)}")
    inspect.add_argument("--picture", type=to_path, help="where the picture goes (default: beside the file, as .png)")

    random = command("random", run_random, "make a random vector with the same norms: the control of any claim")
    random.add_argument("--like", required=True, help="the vector whose norms are taken")
    random.add_argument("--output", required=True, type=to_path, help="the .safetensors file to write")
    random.add_argument("--seed", type=int, default=0, help="seed of the random rotation (default: %(default)s)")

    project = command("project", run_project, "measure how far an adapter moves a model along a vector")
    project.add_argument("--model", required=True, help="the base model: folder, hub id or shipped name")
    project.add_argument("--adapter", required=True, help="folder that PEFT saved")
    project.add_argument("--vector", required=True, help="a file, or a shipped vector")
    project.add_argument("--trait", help="trait whose held-out questions are asked (default: the vector's)")
    project.add_argument(
        "--layer", type=int, help="the layer to name at the end (default: the one that the vector suggests)"
    )
    return parser


def run_extract(args: argparse.Namespace, console: Console) -> None:
    from ..models.load import load_tokenizer
    from ..models.shipped import resolve_model

    _check_output(args.output)
    trait = load_trait(args.trait)
    path = resolve_model(args.model)
    check_extraction(load_tokenizer(path), args.max_new_tokens, args.batch_size)
    model, tokenizer = _load(path, args.dtype)
    rollouts = args.output.with_suffix(".rollouts.jsonl")
    console.print(
        f"Answers are kept in {rollouts}: an interrupted run resumes from there.", soft_wrap=True, highlight=False
    )
    extraction = extract_vector(
        model,
        tokenizer,
        trait,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
        rollouts_file=rollouts,
        progress=True,
    )
    extraction.vector.save(args.output)
    show(extraction.vector, console)
    console.print(f"Saved: {args.output}", soft_wrap=True, highlight=False)


def run_inspect(args: argparse.Namespace, console: Console) -> None:
    vector = load_vector(args.vector)
    show(vector, console)
    picture = args.picture or Path(args.vector).with_suffix(".png")
    try:
        draw(vector, picture)
    except ImportError:
        console.print("No picture: it needs matplotlib (`pip install matplotlib`).")
    else:
        console.print(f"Picture: {picture}", soft_wrap=True, highlight=False)


def run_random(args: argparse.Namespace, console: Console) -> None:
    _check_output(args.output)
    if args.output.resolve() == Path(args.like).expanduser().resolve():
        raise ValueError(f"--output={args.output} is the vector of --like, which would be lost: name another file.")
    random_like(load_vector(args.like), args.seed).save(args.output)
    console.print(f"Saved: {args.output}", soft_wrap=True, highlight=False)


def run_project(args: argparse.Namespace, console: Console) -> None:
    from ..evaluation.candidates import check_candidates, load_candidates

    vector = load_vector(args.vector)
    layer = check_layer(vector, args.layer)
    own = vector.metadata.get("trait", "")
    trait = args.trait or own
    # The vector's file may name its trait. Only a shipped trait is accepted from there, because `load_trait` takes any
    # other name as a path, and no file may decide which other file is read.
    if not args.trait and own not in SHIPPED_TRAITS:
        says = f"is of the trait {own!r}, which is not a shipped one" if own else "does not say whose it is"
        raise ValueError(
            f"--trait is missing, and the vector {says}: name the trait whose questions are asked, or its file."
        )
    questions = load_trait(trait).heldout_questions
    candidates, tokenizer = load_candidates(args.model, adapters=name_adapters([args.adapter], "--adapter"))
    check_candidates(candidates, tokenizer)
    shift = persona_shift(candidates[0].model, tokenizer, vector, questions)
    table = Table(title=f"Shift of {args.adapter} along {trait}")
    for heading in ("layer", "shift along v̂", "share of ‖v‖"):
        table.add_column(heading, justify="right")
    for index, (value, norm) in enumerate(zip(shift, vector.norms, strict=True)):
        table.add_row(
            str(index),
            f"{value:+.4f}",
            f"{value / norm:+.3f}" if norm else "–",
            style="bold" if index == layer else None,
        )
    console.print(table)
    console.print(
        f"persona_shift at layer {layer}: {shift[layer]:+.4f} (mean over {len(questions)} questions, last prompt "
        "token)"
    )


def show(vector: PersonaVector, console: Console) -> None:
    """Print a vector's metadata, and per layer its norm and, if known, how well it separates held-out prompts.

    AUROC and separation say how well the vector tells prompts that ask for the trait from prompts that ask for its
    opposite. These prompts are held out: the vector was made from other questions.
    """
    facts = vector.metadata
    console.print(
        f"{vector.kind} vector, trait {facts.get('trait', 'not stated')}, model {facts.get('model', 'not stated')}, "
        f"{vector.num_layers} blocks of width {vector.hidden_size}",
        soft_wrap=True,
        highlight=False,
    )
    if {"kept", "pairs", "rule", "heldout"} <= facts.keys():
        console.print(
            f"{facts['kept']} of {facts['pairs']} pairs of answers kept ({facts['rule']}), "
            f"{facts['heldout']} held-out prompts a side",
            soft_wrap=True,
            highlight=False,
        )
    columns = {"layer": range(vector.num_layers + 1), "‖v‖": vector.norms}
    names = {"state_norms": "‖state‖", "auroc": "AUROC", "separation": "separation", "random_auroc": "AUROC, random"}
    columns |= {names[key]: facts[key] for key in names if key in facts}
    table = Table()
    for heading in columns:
        table.add_column(heading, justify="right")
    for layer, *row in zip(*columns.values(), strict=True):
        style = "bold" if layer == vector.suggested_layer else None
        table.add_row(str(layer), *(f"{value:.3f}" for value in row), style=style)
    console.print(table)
    if vector.suggested_layer is not None:
        console.print(f"Suggested layer: {vector.suggested_layer}")


def draw(vector: PersonaVector, path: Path) -> None:
    """Draw the norms per layer and, if the vector's file has it, the AUROC per layer, which [`show`] explains."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    facts = vector.metadata
    panels = 2 if "auroc" in facts else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.8), constrained_layout=True, squeeze=False)
    norms = axes[0, 0]
    norms.plot(vector.norms, color="#2e86ab", marker=".", label="‖v(l)‖")
    if "state_norms" in facts:
        norms.plot(facts["state_norms"], color="#9aa0a6", marker=".", label="mean ‖state‖")
        norms.set_yscale("log")
    norms.set_title("Norm")
    if panels == 2:
        area = axes[0, 1]
        area.plot(facts["auroc"], color="#d1495b", marker=".", label="this vector")
        if "random_auroc" in facts:
            area.plot(facts["random_auroc"], color="#9aa0a6", marker=".", label="random vectors, either sign")
        area.set_ylim(0.4, 1.03)
        area.set_title("AUROC of held-out prompts")
    for axis in axes.flat:
        axis.set_xlabel("layer")
        if vector.suggested_layer is not None:
            axis.axvline(vector.suggested_layer, color="black", linewidth=0.8, linestyle=":", label="suggested layer")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{vector.kind} persona vector, trait {facts.get('trait', 'not stated')}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _load(path: str, dtype: str) -> tuple[Any, Any]:
    """Load model and tokenizer, on GPUs if there are any. The dtype `auto` is bf16 on a GPU and fp32 on a CPU."""
    import torch

    from ..evaluation import load_model

    cuda = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    return load_model(path, dtype=getattr(torch, dtype), device_map="auto" if cuda else None)


def _check_output(path: Path) -> None:
    """Refuse an output path that does not end in .safetensors, is a folder, or cannot be written."""
    if path.suffix != ".safetensors":
        raise ValueError(f"--output={path} must end in .safetensors.")
    if path.is_dir():
        raise ValueError(f"--output={path} is a folder: name a file.")
    check_writable("--output", path.parent)


if __name__ == "__main__":
    sys.exit(main())
