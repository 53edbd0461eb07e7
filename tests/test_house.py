"""Rules that keep the house in order: the trainer knows no defense by name, files stay small, imports point up."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import trl_emguard
from trl_emguard.defenses import DEFENSES
from trl_emguard.planning.meta import MetaTrainer


PACKAGE = Path(trl_emguard.__file__).parent
# Words of single defenses. "kl" counts alone or between underscores, since it is a part of many other words.
NAMES = re.compile(r"interleav|inoculat|steer|ldifs|treft|(?<![a-z])kl(?![a-z])", re.IGNORECASE)
WITHOUT_NAMES = sorted(
    path
    for place in (
        "defended.py",
        "host.py",
        "record.py",
        "rows.py",
        "checks.py",
        "guard",
        "reference",
        "planning",
        "checkpoints",
        "ops",
    )
    for path in ([PACKAGE / place] if place.endswith(".py") else (PACKAGE / place).rglob("*.py"))
)
# Names of single defenses' classes, which no code outside of defenses/ may import.
CLASSES = {defense.__name__ for defense in DEFENSES.values()}


def docstring_lines(source: str) -> set[int]:
    """Return the lines of docstrings."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def named(source: str) -> list[str]:
    """Return the identifiers and strings, docstrings apart, that hold the word of a single defense."""
    skipped = docstring_lines(source)
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        speaks = token.type in (tokenize.NAME, tokenize.STRING) or "STRING" in tokenize.tok_name[token.type]
        if speaks and token.start[0] not in skipped and NAMES.search(token.string.replace("_", " ")):
            found.append(f"line {token.start[0]}: {token.string[:60]}")
    return found


@pytest.mark.parametrize("path", WITHOUT_NAMES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_defense_by_name(path):
    source = path.read_text(encoding="utf-8")
    assert named(source) == []
    imported = {
        name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert not imported & CLASSES


def test_the_trainer_names_defenses_in_subclasses_and_one_keyword():
    source = (PACKAGE / "trainer.py").read_text(encoding="utf-8")
    before, _, after = source.partition("\nclass KLTrainer")
    assert after
    left = [line for line in named(before) if "interleave_dataset" not in line]
    assert left == []
    # The keyword stands in the signature, and is passed on unread.
    assert len(re.findall(r"\binterleave_dataset\b(?!`)", re.sub(r'""".*?"""', "", before, flags=re.S))) == 3


def test_the_words_are_found():
    source = 'x = 1\nself.kl_coef = 2\nmessage = "add steering"\nweekly = ankle = 3\n'
    assert [line.split(":")[0] for line in named(source)] == ["line 2", "line 3"]
    # A new defense adds its word to `NAMES`.
    assert [name for name in DEFENSES if not NAMES.search(name)] == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_small(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 60}


def test_the_dry_run_overrides_no_private_method():
    assert [name for name in vars(MetaTrainer) if re.match(r"_(?!_|abc_)", name)] == []


# Rooms from the ground up: a room imports from those before it, and from itself.
ROOMS = (
    "version", "io", "compat", "ops", "models", "evidence", "checkpoints", "data", "persona", "selection", "defenses",
    "guard", "reference", "checks", "config", "record", "host", "defended", "rows", "trainer", "selfcheck", "planning",
    "memory", "evaluation", "judging", "testbeds", "comparison", "scripts",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_up(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("__init__", "recipes"):
        return
    package = ("trl_emguard", *parts[:-1])
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        target = [*base, *(node.module.split(".") if node.module else [])][1:]
        room = target[0] if target else node.names[0].name
        assert ROOMS.index(room) <= ROOMS.index(parts[0]), f"line {node.lineno}: {parts[0]} imports {room}"


VAGUE = re.compile(r"(what|whatever|of|whether|which|those|as|in|where|so)\b", re.IGNORECASE)


def test_docstrings_and_comments_begin_with_their_subject():
    total, vague = 0, []
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        firsts = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                firsts += [text.splitlines()[0]] if text else []
        previous = 0
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and not token.string.startswith(
                ("#!", "# type:", "# noqa", "# ----", "# fmt")
            ):
                # Only the first line of a comment counts.
                alone = token.line.lstrip().startswith("#")
                if not (alone and token.start[0] == previous + 1):
                    firsts.append(token.string.lstrip("# "))
                previous = token.start[0] if alone else 0
        total += len(firsts)
        vague += [f"{path.relative_to(PACKAGE)}: {first[:70]}" for first in firsts if VAGUE.match(first)]
    assert len(vague) <= 0.03 * total, f"{len(vague)} of {total}: " + "\n".join(vague)


def test_tests_use_few_private_names():
    """Count uses of the package's private names, as `x._name` where x is neither `self` nor `cls`."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    own = set(re.findall(r"def (_[a-z]\w*)|self\.(_[a-z]\w*)\s*[:=,]", source))
    own = {name for pair in own for name in pair if name}
    found = []
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_own = isinstance(node, ast.Attribute) and node.attr in own
            if is_own and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(f"{path.name}:{node.lineno} {node.attr}")
    assert len(found) < 20, "\n".join(found)
