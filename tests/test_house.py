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


PATCHES = re.compile(r"(setattr|delattr|patch|patch\.object)$")


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def private_names(source: str) -> tuple[list[str], list[str]]:
    """Return the private names that a test reaches for, each with its line.

    Returns:
        Names used as `x._name`, where x is neither `self` nor `cls`. And names that are imported, or given as a
        literal to a call of `setattr`, `delattr` or `patch`, a path to them included.
    """
    used, given = [], []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            used += [f"line {node.lineno}: {node.attr}"] * (is_private(node.attr) and not is_own)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and PATCHES.search(ast.unparse(node.func)):
            texts = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
            names = [text.rpartition(".")[2] for text in texts if isinstance(text, str)]
        given += [f"line {node.lineno}: {name}" for name in names if is_private(name)]
    return used, given


def test_private_names_are_found():
    lines = (
        "from a import _c, __version__",
        "x._d = self._e",
        "patch.setattr(x, '_f', _g)",
        "patch('a.b._h', x.__i__)",
    )
    used, given = private_names("\n".join(lines))
    assert used == ["line 2: _d"]
    assert given == ["line 1: _c", "line 3: _f", "line 4: _h"]


def test_tests_use_few_private_names():
    """Keep tests from leaning on private names, of this package and of any other.

    Not seen: a name in a variable (`for name in ("_a", "_b"): setattr(x, name, ...)`), in `getattr` or in `vars(x)`, a
    private module on the way to a public name (`from torch._subclasses import ...`), a method that a subclass
    overrides, and uses through `self`.
    """
    used, given = [], []
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for found, names in zip((used, given), private_names(path.read_text(encoding="utf-8")), strict=True):
            found += [f"{path.name} {name}" for name in names]
    assert len(used) < 20, "\n".join(used)
    assert len(given) < 20, "\n".join(given)
