"""Settings of the docs site, built by `make docs`. Pages that stand elsewhere in the repository are copied in."""

import re
from pathlib import Path

from trl_emguard.version import __version__


DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Page of the site → file of the repository.
COPIES = {
    "recipes.md": "recipes/README.md",
    "data.md": "trl_emguard/data/shipped/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
MADE = "made"

project = "trl_emguard"
author = "The trl_emguard founders"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "trl_emguard"
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False


def link_inside(text: str, folder: Path) -> str:
    """Point links at pages of the site, and write links to other files as code: they have no public address yet.

    Args:
        text: Markdown.
        folder: folder of the repository that relative links start from.
    """
    pages = {(ROOT / source).resolve(): f"/{MADE}/{page}" for page, source in COPIES.items()}
    pages |= {page.resolve(): f"/{page.name}" for page in DOCS.glob("*.md")}

    def replace(match: re.Match) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or not target:
            return match[0]
        path = (folder / target).resolve()
        if path in pages:
            return f"[{label}]({pages[path]}{anchor})"
        if path.suffix == ".png":
            return f"[{label}](/{path.relative_to(DOCS)})"
        return f"`{label.strip('`')}`"

    return re.sub(r"\[([^\]\[]+)\]\(([^)#\s]*)(#[^)\s]*)?\)", replace, text)


def copy_pages() -> None:
    (DOCS / MADE).mkdir(exist_ok=True)
    for page, source in COPIES.items():
        path = ROOT / source
        text = link_inside(path.read_text(encoding="utf-8"), path.parent)
        (DOCS / MADE / page).write_text(text, encoding="utf-8")


def read_source(app, name, source):
    if not name.startswith(MADE):
        source[0] = link_inside(source[0], DOCS)


def to_rst(app, what, name, obj, options, lines):
    """Turn the Markdown of a docstring into what autodoc reads: code in backticks, links without an address."""
    text = "\n".join(lines)
    blocks = [
        as_code(block) if block.startswith("```") else as_text(block)
        for block in re.split(r"(```.*?```)", text, flags=re.S)
    ]
    lines[:] = "".join(blocks).splitlines()


def as_code(block: str) -> str:
    code = block.removeprefix("```").split("\n", maxsplit=1)[1].removesuffix("```").rstrip()
    indent = re.match(r" *", code)[0]
    rows = [f"{indent}   {row.removeprefix(indent)}" for row in code.splitlines()]
    return f"\n{indent}.. code-block:: python\n\n" + "\n".join(rows) + "\n"


def as_text(block: str) -> str:
    block = re.sub(r"\[`~?([^`]+)`\](\([^)]*\))?", lambda m: f"`{m[1].rsplit('.', 1)[-1]}`", block)
    block = re.sub(r"\[([^\]`]+)\]\(https?://[^)]*\)", r"\1", block)
    return re.sub(r"`+([^`]+)`+", r"``\1``", block).replace("**", "\\*\\*").replace("|", "\\|")


def setup(app):
    copy_pages()
    app.connect("source-read", read_source)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", to_rst, priority=100)
