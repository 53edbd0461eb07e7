"""The demo's table and picture, from known figures, and what stops it before or while it trains."""

import pytest
from rich.console import Console

from trl_emguard.evaluation.results import ResultRow, Results
from trl_emguard.scripts import demo, shared
from trl_emguard.scripts import main as commands
from trl_emguard.scripts.demo import draw, figures, make_table


def row(model, set, metric, value):
    return ResultRow(model, set, "plain", metric, value, value - 0.1, value + 0.1, 24)


def test_table_and_picture(tmp_path):
    results = Results(
        [
            row(model, set, metric, value)
            for model, in_domain, general in (("none", 1.0, 0.9), ("kl", 0.8, 0.1))
            for set, metric, value in (
                ("in_domain", "trait_rate", in_domain),
                ("general", "trait_rate", general),
                ("general", "nll", 3.0),
                ("general", "repetition", 0.25),
            )
        ]
    )
    rows = {name: figures(results, name, seconds) for name, seconds in (("none", 1.5), ("kl", None))}
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as captured:
        console.print(make_table(rows))
    (none,) = [line for line in captured.get().splitlines() if "none" in line]
    assert [cell.strip() for cell in none.strip("│ ").split("│")] == ["none", "1.00", "0.90", "3.00", "0.25", "1.50"]
    draw(rows, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def trainings(monkeypatch):
    """Return the folders of trainings, which all end as with Ctrl-C."""
    found = []

    def interrupted(testbed, options, folder):
        found.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    return found


def test_a_missing_package_is_told_before_training(tmp_path, trainings, monkeypatch, capsys):
    monkeypatch.setattr(shared, "find_spec", lambda name: None)
    assert commands.main(["demo", "--output_dir", str(tmp_path)]) == 1
    assert "trl-emguard demo: error: the report's charts need matplotlib" in capsys.readouterr().err
    assert trainings == []


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path, trainings, capsys):
    (tmp_path / "file").write_text("")
    assert commands.main(["demo", "--output_dir", str(tmp_path / "file" / "out")]) == 1
    assert "trl-emguard demo: error: --output_dir=" in capsys.readouterr().err
    assert trainings == []


def test_an_interrupted_demo_says_so(tmp_path, trainings, capsys):
    assert commands.main(["demo", "--output_dir", str(tmp_path)]) == 130
    assert "interrupted." in capsys.readouterr().err
    assert trainings == [tmp_path / "demo_runs" / "none"]
