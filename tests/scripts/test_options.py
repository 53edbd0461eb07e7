"""Options are described once, in their fields: the help page and the tables of the docs repeat those texts.

`python tests/scripts/test_options.py` writes the tables of the docs anew.
"""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from trl_emguard import EMGuardConfig
from trl_emguard.config import ReferenceOptions
from trl_emguard.defenses import DEFENSES, DefenseArguments
from trl_emguard.scripts import compare, demo, evaluate, persona, project, score, select
from trl_emguard.scripts.options import COMMAND, COMMON, methods, own_fields, title
from trl_emguard.scripts.recipes import recipes_dir
from trl_emguard.scripts.sft import make_parser
from trl_emguard.scripts.shared import name_adapters


DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("kl", "ldifs", "treft", "steering", "inoculation", "inoculation_adapter", "interleaving")
TABLES = dict(zip(PAGES, methods(), strict=True))
HEAD = "| option | default | meaning |\n|---|---|---|\n"
TABLE = re.compile(re.escape(HEAD) + r"(\|.*\n)*")


def table_of(cls):
    """Return the table of a method's options in Markdown."""
    lines = []
    for f in fields(cls):
        default = f'"{f.default}"' if isinstance(f.default, str) else f.default
        default = "–" if default is None else f"`{default}`"
        lines.append(f"| `{f.name}` | {default} | {f.metadata['help']} |\n")
    return HEAD + "".join(lines)


def page(option, columns=100):
    """Return the text that an option of the help prints in a terminal with so many columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        parser = make_parser()
        return parser.format_help() if option == "--help" else parser.format_all_options()


def groups(text):
    """Return {title: options} of a help page."""
    found = {}
    for line in text.splitlines():
        if re.match(r"\S.*:$", line):
            options = found[line[:-1]] = []
        elif match := re.match(r"  --(\w+)", line):
            options.append(match[1])
    return found


@pytest.mark.parametrize(
    ("module", "run", "words", "names"),
    [
        (compare, "run", "--config c --output_dir=~/a", ["output_dir"]),
        (demo, "run", "--output_dir=~/a", []),
        (evaluate, "run", "--rejudge=~/b --output_dir=~/a", ["output_dir", "rejudge"]),
        (persona, "run_extract", "extract --model m --trait evil --output=~/a", ["output"]),
        (persona, "run_inspect", "inspect v --picture=~/a", ["picture"]),
        (persona, "run_random", "random --like v --output=~/a", ["output"]),
        (project, "run", "--adapter=~/b --base m --aligned m --output=~/a", ["output", "adapter"]),
        (score, "run", "--model m --misaligned b --dataset d --output=~/a", ["output"]),
        (select, "run", "--scores=~/b --by gap --count 1 --output=~/a", ["output", "scores"]),
    ],
)
def test_the_home_folder_in_a_path(monkeypatch, tmp_path, module, run, words, names):
    """A shell does not expand the `~` of `--output_dir=~/a`."""
    given = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(module, run, lambda args, *more: given.append(args))
    assert module.main(words.split()) == 0
    found = [getattr(given[0], name) for name in names] or given
    assert found == [tmp_path / name for name in "ab"[: len(found)]]


def test_the_home_folder_in_an_adapter(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert name_adapters(["~/a", "other=~/b"], "--adapter") == {"a": f"{tmp_path}/a", "other": f"{tmp_path}/b"}


@pytest.mark.parametrize("page_name", TABLES)
def test_the_docs_repeat_the_fields(page_name):
    text = (DOCS / f"{page_name}.md").read_text(encoding="utf-8")
    tables = [match[0] for match in TABLE.finditer(text)]
    assert tables == [table_of(TABLES[page_name])], "run `python tests/scripts/test_options.py`"


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_the_help_is_a_page(columns):
    text = page("--help", columns)
    assert len(text.splitlines()) <= 160
    assert max(map(len, text.splitlines())) <= 100
    assert "--help_all" in text.splitlines()[-1]
    assert "--no_" not in text


def test_every_option_of_a_defense_is_in_its_group_once():
    found = groups(page("--help"))
    named = [cls.__name__ for cls in {defense.Options for defense in DEFENSES.values()} - {None}]
    assert sorted(named) == sorted(cls.__name__ for cls in methods())
    for cls in (*methods(), ReferenceOptions):
        assert found[title(cls)] == [f.name for f in fields(cls)]
        assert ": " in title(cls) or cls is ReferenceOptions
    listed = [name for options in found.values() for name in options]
    assert len(listed) == len(set(listed))
    own = {f.name for cls in (DefenseArguments, ReferenceOptions) for f in fields(cls)}
    assert set(listed) == {*own, *COMMON, *COMMAND}


def test_fields_of_a_base_class_are_not_a_defenses_own():
    assert own_fields(DefenseArguments) == ["defense"]


def test_the_help_of_all_options_holds_every_field():
    listed = groups(page("--help_all"))["options"]
    assert {f.name for f in fields(EMGuardConfig) if f.init} <= set(listed)
    assert {*COMMON, *COMMAND} - {"help"} <= set(listed)


def test_the_help_shows_the_values_of_a_recipe():
    parser = make_parser()
    with pytest.raises(SystemExit):
        parser.parse(["--config", str(recipes_dir() / "smollm2-135m-instruct/sft.yaml"), "--help"])
    assert "(default: 0.0002)" in parser.format_help()


@pytest.mark.parametrize(
    ("option", "lines"),
    [("--help", range(100, 161)), pytest.param("--help_all", range(500, 2000), marks=pytest.mark.long)],
)
def test_the_command_prints_its_help(option, lines):
    command = [sys.executable, "-m", "trl_emguard.scripts.main", "sft", option]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) in lines


if __name__ == "__main__":
    for name, options in TABLES.items():
        file = DOCS / f"{name}.md"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(TABLE.search(text)[0], table_of(options)), encoding="utf-8")
