"""The demo's table and picture, from known figures."""

from rich.console import Console

from trl_emguard.evaluation.results import ResultRow, Results
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
