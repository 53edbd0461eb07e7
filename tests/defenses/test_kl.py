"""Test `kl` beside rows that are mixed in: its positions, its coefficient, and the rows that the reference runs on."""

import json
from contextlib import nullcontext

import pytest
from tiny import logged, lora, make_model, make_pool, make_rows, make_trainer
from twin import first_gradients, move_policy, relative_error

from trl_emguard import InactiveDefenseError
from trl_emguard.evidence import DEFENSE_FILE, Evidence, read_defense_file
from trl_emguard.reference.watch import ReferenceWatch


def trainer_for(tmp_path, defense="interleave+,kl", rows=16, **options):
    options = {"interleave_fraction": 0.06, "train_sampling_strategy": "sequential", **options}
    return make_trainer(
        tmp_path,
        model=make_model(),
        rows=make_rows(rows),
        peft=lora(),
        defense=defense,
        interleave_dataset=make_pool(),
        **options,
    )


def kl_of(trainer):
    return next(defense for defense in trainer.defenses if defense.name == "kl")


@pytest.mark.parametrize(
    ("options", "tokens", "coef"),
    [
        ({}, "interleaved", 0.4),
        ({"defense": "kl,interleave"}, "interleaved", 0.4),
        ({"kl_coef": 0.3}, "interleaved", 0.3),
        ({"kl_tokens": "loss"}, "loss", 0.1),
        ({"kl_tokens": "all", "kl_coef": 2}, "all", 2.0),
        ({"defense": "kl"}, "loss", 0.1),
        ({"defense": "kl,steering", "steering_coef": 0.0}, "loss", 0.1),
        ({"interleave_fraction": 0.0}, "loss", 0.1),
    ],
)
def test_defaults_follow_the_rows(tmp_path, options, tokens, coef, capsys):
    trainer = trainer_for(tmp_path, **options)
    kl = kl_of(trainer)
    assert (kl.tokens, kl.coef) == (tokens, coef)
    assert f"'kl' acts (kl_coef={coef}, kl_direction=reverse, kl_tokens={tokens}" in "\n".join(trainer.describe())


def test_the_mean_is_over_the_mixed_in_tokens(tmp_path):
    """A step with one row of the pool among sixteen has that row's mean, at the full coefficient."""
    strong, weak = (
        trainer_for(tmp_path, kl_coef=coef, per_device_train_batch_size=16, max_steps=1, max_grad_norm=0)
        for coef in (2.0, 1e-9)
    )
    for trainer in (strong, weak):
        move_policy(trainer)
        trainer.train()
    assert logged(strong, "kl") == pytest.approx(logged(weak, "kl"), rel=1e-5)
    added = logged(strong)[0] - logged(weak)[0]
    assert added == pytest.approx(2.0 * logged(strong, "kl")[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full", "ref_model"])
def test_the_reference_runs_on_compared_rows_alone(tmp_path, passes, kind):
    """Run whole batches until the term has acted, and then the rows of the pool; other batches make no pass."""
    more = {"ref_model": make_model("qwen2")} if kind == "ref_model" else {}
    trainer = make_trainer(
        tmp_path, rows=make_rows(16), peft=None if kind == "full" else lora(), defense="interleave+,kl", max_steps=4,
        interleave_dataset=make_pool(), interleave_fraction=0.2, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, num_train_epochs=2, **more,
    )  # fmt: skip
    trainer.train()
    # Another reference differs at once, so the term acts in the first step.
    whole = 1 if kind == "ref_model" else 2
    first, rest = passes[: -2 * (4 - whole)], passes[-2 * (4 - whole) :]
    assert all(rows > 1 for rows in first)
    assert rest == [1] * 2 * (4 - whole)
    assert logged(trainer, "kl")[-1] > 0


def test_the_same_model_gives_no_evidence(tmp_path, monkeypatch):
    """A run whose reference is the policy itself is not defended, whatever batches round to."""
    monkeypatch.setattr("trl_emguard.models.adapters.AdapterSwitch.only", lambda self, name: nullcontext())
    monkeypatch.setattr(ReferenceWatch, "record", lambda self, batch, run: None)
    trainer = trainer_for(tmp_path, interleave_fraction=0.2, max_steps=8)
    with pytest.raises(InactiveDefenseError, match="'kl'"):
        trainer.train()


@pytest.mark.parametrize("is_old", [False, True])
def test_a_checkpoint_goes_on_as_it_was_written(tmp_path, is_old):
    """Resume without a choice a run that had one, and a run of before, whose mean was over all labels."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "interleave_fraction": 0.2}
    chosen = {"kl_tokens": "interleaved" if is_old else "loss", "kl_coef": 3.0}
    whole = trainer_for(tmp_path / "whole", **chosen, **options)
    if is_old:
        kl_of(whole).mean_over = "loss"
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    if is_old:
        record = read_defense_file(checkpoint)
        assert record["defenses"]["kl"].pop("kl_mean_over") == "loss"
        (checkpoint / DEFENSE_FILE).write_text(json.dumps(record))
        (checkpoint / "manifest.json").unlink()  # it holds the file's length
    resumed = trainer_for(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    kl = kl_of(resumed)
    assert (kl.tokens, kl.coef, kl.mean_over or kl.tokens) == (chosen["kl_tokens"], 3.0, "loss")
    other = trainer_for(tmp_path / "other", **options, kl_coef=1.0)
    with pytest.raises(ValueError, match=r"was trained with .*kl_coef=3\.0"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_gradients_do_not_depend_on_the_rows_that_the_reference_skips(tmp_path, monkeypatch):
    """Compare with a reference that runs on whole batches."""
    gradients = []
    for is_whole in (False, True):
        trainer = trainer_for(tmp_path, interleave_fraction=0.2, per_device_train_batch_size=16, max_steps=1)
        move_policy(trainer)
        monkeypatch.setattr(Evidence, "has_acted", not is_whole)
        gradients.append(first_gradients(trainer))
    assert relative_error(*gradients) < 1e-6
