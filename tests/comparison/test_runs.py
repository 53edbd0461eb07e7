"""Training of a comparison's runs: what makes it begin anew, go on or stop. The trainings are not made."""

import pytest
from figures import plan

from trl_emguard.comparison import runs as training
from trl_emguard.comparison.runs import train_all


TEXT = "recipe: RECIPE\nruns: [{defense: kl}, {defense: ldifs}]\n"
STATUS = {"error": None, "step": 3, "seconds_per_step": 0.5, "peak_memory": 1}


def silent(line):
    pass


@pytest.fixture
def trained(monkeypatch):
    """Return the names of the runs that were trained, and a list of functions to call in each training."""
    names, calls = [], []

    def run(run, recipe, folder):
        names.append(run.name)
        folder.mkdir(parents=True, exist_ok=True)
        for call in calls:
            call()
        return STATUS

    monkeypatch.setattr(training, "_run_process", run)
    return names, calls


@pytest.mark.parametrize("name", ["sft.yaml", "rows.jsonl"])
def test_inputs_that_change_while_a_comparison_runs_end_it(tmp_path, trained, name):
    """The other runs would be trained on the new ones, under the keys of the old ones."""
    names, calls = trained
    (tmp_path / "rows.jsonl").write_text("a")
    made = plan(tmp_path, TEXT, f"dataset_name: {tmp_path / 'rows.jsonl'}\n")
    path = tmp_path / name
    before = path.read_text()
    calls.append(lambda: path.write_text(f"{before}\n# another"))
    for _ in range(2):  # a second start, with the new content from the beginning, trains nothing
        with pytest.raises(ValueError, match="has changed since this comparison began; start it again"):
            train_all(made, tmp_path / "out", silent)
        assert names == ["none"]
        assert not list((tmp_path / "out").rglob("run.json"))
    path.write_text(before)
    calls.clear()
    train_all(made, tmp_path / "out", silent)
    assert names == ["none", "none", "kl", "ldifs"]
