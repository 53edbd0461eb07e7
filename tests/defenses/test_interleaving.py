"""Test `interleave`, `interleave+` and `interleave++` in the trainer: chosen rows, their labels, and their arrival."""

import json
import re
from functools import partial
from importlib.resources import files

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import (
    STRICT,
    config,
    evidence,
    logged,
    lora,
    make_model,
    make_pool,
    make_rows,
    make_tokenizer,
    make_trainer,
    record,
    save_model,
)
from transformers import TrainerCallback
from trl import SFTTrainer, pack_dataset
from twin import first_gradients, move_policy, relative_error, twin_step

from trl_emguard import EMGuardTrainer, InactiveDefenseError, InterleavingTrainer
from trl_emguard.defenses import Interleaving
from trl_emguard.defenses.interleaving.collator import INTERLEAVED
from trl_emguard.defenses.interleaving.pool import Pool
from trl_emguard.evidence import read_defense_file
from trl_emguard.selection.scored import ScoresInfo, write_scores


VARIANTS = ["interleave", "interleave+", "interleave++"]
# One step takes all rows in their order, and its gradient is not changed.
ONE_STEP = {"max_steps": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 0}


def trainer_for(tmp_path, defense="interleave+", rows=8, pool=None, **options):
    options = {"interleave_fraction": 0.2, **options}
    if "model" not in options:
        options["model"] = make_model()
    return make_trainer(
        tmp_path,
        rows=make_rows(rows) if isinstance(rows, int) else rows,
        peft=options.pop("peft", lora()),
        defense=defense,
        interleave_dataset=make_pool() if pool is None else pool,
        **options,
    )


def pool_of(trainer):
    """Return the tokenised pool, best row first."""
    (pool,) = (defense.pool for defense in trainer.defenses if isinstance(defense, Interleaving))
    return pool.tokenised


def other_answer(pool, row=0):
    """Return a pool of the same size, with another answer in one row. By default it is the row that is ranked last."""
    rows = pool.to_list()
    rows[row]["completion"][0]["content"] = "another"
    return Dataset.from_list(rows)


class Tap(TrainerCallback):
    """Return the rows that the policy is trained on, per step: `(text, True for a row of the pool)`."""

    def __init__(self, trainer):
        self.steps = []
        original = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            if model.training and "labels" in inputs:
                marks = inputs.get(INTERLEAVED, torch.zeros_like(inputs["input_ids"], dtype=torch.bool))
                lengths = inputs["attention_mask"].sum(1).tolist()
                ids = inputs["input_ids"]
                texts = [make_tokenizer().decode(ids[i, :length]) for i, length in enumerate(lengths)]
                self.steps.append(list(zip(texts, marks[:, 0].tolist(), strict=True)))
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss


def safe_rows(trainer):
    """Return the questions of the pool's rows, in the order in which rows are chosen."""
    texts = [make_tokenizer().decode(ids) for ids in pool_of(trainer)["input_ids"]]
    return [text.split("user\n")[1].split("<|im_end|>")[0] for text in texts]


def test_one_argument_switches_the_choice(tmp_path):
    pools = {defense: safe_rows(trainer_for(tmp_path, defense)) for defense in VARIANTS}
    assert sorted(pools["interleave"]) == sorted(f"safe {i}" for i in range(12))
    assert pools["interleave+"] == [f"safe {i}" for i in reversed(range(12))]
    assert pools["interleave++"] == [f"safe {i}" for i in reversed(range(12)) if i % 3]
    assert pools["interleave"] != pools["interleave+"]
    # Random rows differ with the seed.
    assert safe_rows(trainer_for(tmp_path, "interleave", seed=7)) != pools["interleave"]


def test_the_step_is_that_of_sft_on_the_mixed_rows(tmp_path):
    trainer = trainer_for(tmp_path, per_device_train_batch_size=8, **ONE_STEP)
    mixed = [*trainer.train_dataset.select_columns(["input_ids", "labels"]), *pool_of(trainer).select([0, 1])]
    ours = first_gradients(trainer)
    rows = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in mixed])
    # Without a defense, the trainer is SFTTrainer (test_trainer.py).
    plain = make_trainer(tmp_path, rows=rows, peft=lora(), per_device_train_batch_size=10, **ONE_STEP)
    theirs = first_gradients(plain)
    assert relative_error(ours, theirs) < 1e-5
    assert logged(trainer)[0] == pytest.approx(logged(plain)[0], rel=1e-5)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("tokens", ["interleaved", "loss", "all"])
def test_kl_on_mixed_rows_equals_the_twin_however_the_step_is_cut(tmp_path, batch, accumulation, tokens):
    trainer = trainer_for(
        tmp_path,
        "interleave+,kl",
        kl_tokens=tokens,
        kl_coef=0.5,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **ONE_STEP,
    )
    move_policy(trainer)
    mixed_in = list(pool_of(trainer).select([0, 1]))
    values, expected = twin_step(trainer, mixed_in=mixed_in)
    gradients = first_gradients(trainer)
    assert relative_error(gradients, expected) < 1e-5
    for name in ("loss", "loss_ce", "kl"):
        assert logged(trainer, name)[0] == pytest.approx(values[name], rel=1e-5)
    assert values["kl"] > 0
    # The losses are logged by source, too.
    tokens_of = [sum(label != -100 for label in row["labels"][1:]) for row in [*trainer.train_dataset, *mixed_in]]
    fine, safe = logged(trainer, "loss_finetune")[0], logged(trainer, "loss_interleaved")[0]
    total = (fine * sum(tokens_of[:8]) + safe * sum(tokens_of[8:])) / sum(tokens_of)
    assert total == pytest.approx(values["loss_ce"], rel=1e-5)
    assert fine != pytest.approx(safe)


def test_a_step_without_a_safe_row_has_no_kl_on_them(tmp_path):
    trainer = trainer_for(
        tmp_path, "interleave+,kl", rows=16, interleave_fraction=0.06, kl_tokens="interleaved", max_steps=4
    )
    trainer.train()
    assert len(logged(trainer, "kl")) == 1
    assert len(logged(trainer, "loss_interleaved")) == 1
    assert evidence(trainer, "interleave+") == {"rows_finetune": 16, "rows_interleaved": 1, "acted": True}


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}])
def test_the_training_rows_come_as_in_plain_training(tmp_path, options):
    """Compare the batches of two epochs: a defended and an undefended run differ in the pool's rows alone."""
    options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 3, **options}
    plain = make_trainer(tmp_path, rows=make_rows(14), peft=lora(), **options)
    mixed = trainer_for(tmp_path, rows=14, **options)
    taps = [Tap(plain), Tap(mixed)]
    for trainer in (plain, mixed):
        trainer.train()
    expected, steps = (tap.steps for tap in taps)
    assert [[row for row in step if not row[1]] for step in steps] == expected
    for epoch in (steps[:5], steps[5:]):
        safe = sorted(text for step in epoch for text, mark in step if mark)
        assert len(safe) == len(set(safe)) == 4  # round(14 · 0.2 / 0.8)
        assert max(sum(mark for _, mark in step) for step in epoch) == 1
    assert logged(mixed, "interleaved_fraction")[-1] == pytest.approx(8 / 36)


def test_a_new_draw_each_epoch_goes_on_in_the_pool(tmp_path):
    trainer = trainer_for(
        tmp_path, interleave_redraw=True, max_steps=-1, num_train_epochs=4, per_device_train_batch_size=8
    )
    tap = Tap(trainer)
    trainer.train()
    drawn = [sorted(int(text.split("safe ")[1].split("<")[0]) for text, mark in step if mark) for step in tap.steps]
    assert drawn == [[10, 11], [8, 9], [6, 7], [4, 5]]


@pytest.mark.parametrize(
    "save_at", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)]
)
def test_resume_equals_the_run_that_never_stopped(tmp_path, save_at):
    options = {
        "defense": "interleave+,kl", "rows": 14, "max_steps": 6, "save_strategy": "steps", "save_steps": save_at,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    whole = trainer_for(tmp_path / "whole", **options)
    tap = Tap(whole)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", **options)
    resumed_tap = Tap(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{save_at}"))
    skipped = len(tap.steps) - len(resumed_tap.steps)
    assert skipped >= save_at
    assert resumed_tap.steps == tap.steps[skipped:]
    for key in ("loss", "loss_finetune", "loss_interleaved", "interleaved_fraction", "kl", "grad_norm"):
        assert logged(resumed, key) == logged(whole, key)
    assert record(resumed)["evidence"] == record(whole)["evidence"]


@pytest.mark.parametrize("kind", ["rows", pytest.param("stream", marks=pytest.mark.long), "stream, 2 workers"])
@pytest.mark.parametrize(
    ("before", "after", "save_at"),
    [(2, 5, 3), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in ((2, 3, 1), (4, 2, 2), (2, 2, 2)))],
)
def test_a_resume_with_another_batch_size_goes_on_in_the_plan(tmp_path, kind, before, after, save_at):
    """Compare with a run that had the second batch size from the start: the same batches from the same step on."""

    def run(folder, batch, checkpoint=None):
        rows = make_rows(40) if kind == "rows" else make_rows(40).to_iterable_dataset()
        trainer = trainer_for(
            tmp_path / folder, rows=rows, max_steps=8, save_strategy="steps", save_steps=save_at,
            per_device_train_batch_size=batch, dataloader_num_workers=2 if "workers" in kind else 0,
        )  # fmt: skip
        tap = Tap(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return tap.steps

    run("first", before)
    resumed = run("resumed", after, str(tmp_path / "first" / f"checkpoint-{save_at}"))
    assert resumed == run("whole", after)[save_at:]


def test_a_checkpoint_of_a_version_that_recorded_tokens_resumes(tmp_path):
    """Earlier versions wrote the number of tokenised rows, and a checksum of their tokens."""
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, **options)
    trainer.train()
    whole = logged(trainer)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    path = tmp_path / "checkpoint-4" / "defense.json"
    found = json.loads(path.read_text())
    (defense,) = trainer.defenses
    found["defenses"]["interleave+"]["interleave_dataset"] = defense.pool.describe_tokens()
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="Resume with the same defense and options"):
        trainer_for(tmp_path, pool=other_answer(make_pool()), **options).train(resume_from_checkpoint=True)
    resumed = trainer_for(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == whole


@pytest.mark.parametrize(("unusable", "looked_at"), [(0, 64), (63, 128)])
def test_a_large_pool_is_tokenised_as_far_as_the_plan_takes_it(tmp_path, unusable, looked_at):
    rows = make_pool(400).to_list()
    for row in rows[400 - unusable :]:
        row["completion"][0]["content"] = "long " * 60
    pool = Dataset.from_list(rows)
    trainers = [trainer_for(tmp_path, pool=pool, max_length=100) for pool in (pool, other_answer(pool))]
    for trainer in trainers:
        (defense,) = trainer.defenses
        assert defense.pool.looked_at == looked_at
        assert safe_rows(trainer)[:2] == [f"safe {399 - unusable - i}" for i in range(2)]
    # The record is of all ranked rows, and not only of those that were looked at.
    assert record(trainers[0])["defenses"] != record(trainers[1])["defenses"]


def test_another_pool_is_another_defense(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, **options).train()
    with pytest.raises(ValueError, match="Resume with the same defense and options"):
        trainer_for(tmp_path, pool=other_answer(make_pool()), **options).train(resume_from_checkpoint=True)
    trainer_for(tmp_path, pool=make_pool(), **options).train(resume_from_checkpoint=True)


def test_evaluation_is_never_mixed(tmp_path):
    trainer = trainer_for(tmp_path, eval_dataset=make_rows(6))
    plain = make_trainer(tmp_path, rows=make_rows(8), peft=lora(), eval_dataset=make_rows(6))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    batches = list(trainer.get_eval_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) == 6
    assert not any(INTERLEAVED in batch for batch in batches)


# ---- labels and templates ----


def first_safe(trainer):
    row = pool_of(trainer)[0]
    labels = [label for label in row["labels"] if label != -100]
    return make_tokenizer().decode(row["input_ids"]), make_tokenizer().decode(labels)


ANSWER = "sure sure sure sure "
WHOLE = f"<|im_start|>user\nsafe 11<|im_end|><|im_start|>assistant\n{ANSWER}<|im_end|>"


def as_messages(rows):
    return Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in rows])


@pytest.mark.parametrize("names", [("question", "answer"), ("response", "prompt"), ("prompt", "response")])
def test_a_scored_file_says_which_columns_it_was_scored_with(tmp_path, names):
    pool = [
        {"prompt": row["prompt"][0]["content"], "response": row["completion"][0]["content"]} for row in make_pool()
    ]
    usual = Dataset.from_list(pool).add_column("gap", make_pool()["gap"]).add_column("kept", ["yes"] * len(pool))
    renamed = usual.rename_columns({"prompt": "p", "response": "r"}).rename_columns(
        dict(zip("pr", names, strict=True))
    )
    if "question" in names:
        renamed = renamed.add_column("prompt", ["another"] * len(pool))
    info = ScoresInfo("tiny", ("medical",), 1.0, len(pool), (), *names, "abc", "0")
    (tmp_path / "folder").mkdir()
    files = [tmp_path / "folder" / f"{split}.parquet" for split in ("train", "chosen")]
    for file in files:
        write_scores(file, renamed, info)
    expected = pool_of(trainer_for(tmp_path, "interleave++", pool=usual))[:]
    for source, split in ((tmp_path / "folder", "train"), (files[0], "train"), (tmp_path / "folder", "chosen[:100%]")):
        if split != "train":
            files[0].unlink()
        args = config(
            tmp_path, defense="interleave++", interleave_dataset=str(source), interleave_fraction=0.2,
            interleave_where="kept=yes", interleave_split=split,
        )  # fmt: skip
        trainer = EMGuardTrainer(make_model(), args, train_dataset=make_rows(8), processing_class=make_tokenizer())
        assert pool_of(trainer)[:] == expected


def test_scored_files_of_different_models_do_not_go_together(tmp_path):
    for split, model in (("train", "tiny"), ("more", "tiny"), ("other", "other")):
        info = ScoresInfo(model, ("medical",), 1.0, 12, (), "prompt", "response", "abc", "0")
        write_scores(tmp_path / f"{split}.parquet", make_pool(), info)
    make_pool().to_parquet(tmp_path / "plain.parquet")
    pool = partial(Pool, rows=None, source=str(tmp_path), who="interleave++", by="gap", drop_refusals=True, seed=0)
    assert len(pool(split="train+more[:50%]").ranked)
    for split in ("train+other", "train[:4]+plain"):
        with pytest.raises(ValueError, match=f"interleave_split={re.escape(repr(split))} names files that do not go"):
            pool(split=split)
    assert pool(split="train+other", by="random").ranked  # random order reads no score


@pytest.mark.parametrize("defense", ["interleave", "interleave+"])
def test_gaps_of_another_model_are_told(tmp_path, caplog, defense):
    info = ScoresInfo("hub/Other-Model", ("medical",), 1.0, 12, (), "prompt", "response", "abc", "0")
    write_scores(tmp_path / "scores.parquet", make_pool(), info)
    args = config(
        tmp_path, defense=defense, interleave_dataset=str(tmp_path / "scores.parquet"), interleave_fraction=0.2
    )
    for name, is_told in ((tmp_path / "trained", defense == "interleave+"), (tmp_path / "other-model", False)):
        save_model(name)
        caplog.clear()
        EMGuardTrainer(str(name), args, train_dataset=make_rows(8), processing_class=make_tokenizer())
        told = f"the pool's gaps are of 'hub/Other-Model', and this run trains {str(name)!r}"
        assert (told in caplog.text) == is_told


def tokenised(masked):
    rows = make_trainer("unused", rows=make_rows(8)).train_dataset.to_list()
    return Dataset.from_list(
        [{"input_ids": r["input_ids"], "labels": r["labels"] if masked else r["input_ids"]} for r in rows]
    )


@pytest.mark.parametrize(
    ("rows", "options", "answer_alone"),
    [
        ("prompt", {}, True),
        ("prompt", {"completion_only_loss": False}, False),
        ("messages", {}, False),
        ("text", {}, False),
        ("tokenised", {}, True),
        ("tokenised, all labels", {}, False),
        # The prompt's turn has no labels, and the other turns keep theirs.
        ("messages", {"defense": "inoculation,interleave+"}, False),
        # TRL masks no token of such rows.
        ("messages", {"completion_only_loss": True}, False),
    ],
)
def test_safe_rows_follow_the_masking_of_the_run(tmp_path, rows, options, answer_alone):
    data = {
        "prompt": lambda: make_rows(8),
        "messages": lambda: as_messages(make_rows(8)),
        "text": lambda: Dataset.from_dict({"text": [f"text {i}" for i in range(8)]}),
        "tokenised": lambda: tokenised(True),
        "tokenised, all labels": lambda: tokenised(False),
    }[rows]()
    trainer = trainer_for(tmp_path, rows=data, **options)
    text, labels = first_safe(trainer)
    # The pool's own format makes no difference.
    assert text == WHOLE
    assert labels == (f"{ANSWER}<|im_end|>" if answer_alone else WHOLE)
    for form in (as_messages(make_pool()), Dataset.from_list([
        {"prompt": row["prompt"][0]["content"], "response": row["completion"][0]["content"]} for row in make_pool()
    ])):  # fmt: skip
        other = trainer_for(tmp_path, rows=data, pool=form.add_column("gap", make_pool()["gap"]), **options)
        assert first_safe(other) == (text, labels)


def test_a_tokenised_pool_stays_as_it_is(tmp_path):
    pool = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 3, "labels": [[-100, 6, 7]] * 3, "gap": [0.1, 0.2, 0.3]})
    assert pool_of(trainer_for(tmp_path, pool=pool))[0] == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    with pytest.raises(ValueError, match="reads the answers to leave refusals out"):
        trainer_for(tmp_path, "interleave++", pool=pool)
    with pytest.raises(ValueError, match="tokenised and has no `labels`, and this run trains on answers alone"):
        trainer_for(tmp_path, pool=pool.remove_columns(["labels"]))
    trainer = trainer_for(tmp_path, rows=as_messages(make_rows(8)), pool=pool.remove_columns(["labels"]))
    assert pool_of(trainer)[0]["labels"] == [5, 6, 7]


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_tokenised_pool_needs_labels_where_the_loss_is_on_turns_of_the_assistant(tmp_path, has_labels):
    pool = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 3, "labels": [[-100, 6, 7]] * 3, "gap": [0.1, 0.2, 0.3]})
    tokenizer = make_tokenizer()
    tokenizer.chat_template = files("trl.chat_templates").joinpath("qwen2_5.jinja").read_text()
    args = config(tmp_path, defense="interleave+", interleave_fraction=0.2, assistant_only_loss=True)

    def make():
        return EMGuardTrainer(
            make_model(),
            args,
            train_dataset=as_messages(make_rows(8)),
            processing_class=tokenizer,
            interleave_dataset=pool if has_labels else pool.remove_columns(["labels"]),
        )

    if has_labels:
        assert pool_of(make())[0]["labels"] == [-100, 6, 7]
    else:
        with pytest.raises(ValueError, match="tokenised and has no `labels`, and this run trains on answers alone"):
            make()


def test_safe_rows_take_what_the_training_rows_hand_to_the_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if quiet %}QUIET{% endif %}" + tokenizer.chat_template
    rows = make_rows(8).add_column("chat_template_kwargs", [{"quiet": True}] * 8)
    args = config(tmp_path, defense="interleave+", interleave_fraction=0.2)
    trainer = EMGuardTrainer(
        make_model(), args, train_dataset=rows, processing_class=tokenizer, interleave_dataset=make_pool()
    )
    for data in (trainer.train_dataset, pool_of(trainer)):
        assert all(tokenizer.decode(ids).startswith("QUIET") for ids in data["input_ids"])
    # Arguments that only some training rows set are not taken, in any order of the rows.
    kwargs = [{"quiet": i == 0, "loud": True} for i in range(8)]
    tokenizer.chat_template = "{% if loud %}LOUD{% endif %}" + tokenizer.chat_template
    rows = make_rows(8).add_column("chat_template_kwargs", kwargs)
    for given in (rows, rows.select(range(7, -1, -1))):
        trainer = EMGuardTrainer(
            make_model(), args, train_dataset=given, processing_class=tokenizer, interleave_dataset=make_pool()
        )
        texts = [tokenizer.decode(ids) for ids in pool_of(trainer)["input_ids"]]
        assert all(text.startswith("LOUD") and "QUIET" not in text for text in texts)
    # A row of the pool may set this itself.
    pool = make_pool(3).add_column("chat_template_kwargs", [None, {"quiet": True}, None])
    trainer = EMGuardTrainer(
        make_model(), args, train_dataset=make_rows(8), processing_class=tokenizer, interleave_dataset=pool
    )
    assert [tokenizer.decode(ids).startswith("QUIET") for ids in pool_of(trainer)["input_ids"]] == [
        False,
        True,
        False,
    ]


def test_rows_that_a_label_calls_harmful_are_refused_or_left_out(tmp_path):
    labels = ["harmful" if i % 2 else "unharmful" for i in range(12)]
    pool = make_pool().add_column("response_harm_label", labels)
    with pytest.raises(
        ValueError, match=r"6 of 12 rows are labelled harmful.*interleave_where='response_harm_label=un"
    ):
        trainer_for(tmp_path, pool=pool)
    trainer = trainer_for(tmp_path, pool=pool, interleave_where="response_harm_label=unharmful")
    texts = [make_tokenizer().decode(ids) for ids in pool_of(trainer)["input_ids"]]
    assert [text.split("safe ")[1].split("<")[0] for text in texts] == ["10", "8", "6", "4", "2", "0"]
    with pytest.raises(ValueError, match="interleave_where=gap=high: no row has this value"):
        trainer_for(tmp_path, pool=pool, interleave_where="gap=high")


def test_a_stream_trains_on_the_best_rows(tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(make_rows(40)))
    trainer = trainer_for(tmp_path, rows=rows, max_steps=10)
    tap = Tap(trainer)
    trainer.train()
    safe = [text.split("safe ")[1].split("<")[0] for step in tap.steps for text, mark in step if mark]
    assert sorted(map(int, safe)) == list(range(4, 12))  # 8 of the 40 rows that ten steps take


@pytest.mark.parametrize("defense", ["inoculation,interleave++", "interleave++,inoculation"])
def test_inoculation_leaves_safe_rows_alone(tmp_path, defense):
    trainer = trainer_for(tmp_path, defense, inoculation_prompt="Be evil.")
    assert all("Be evil." in make_tokenizer().decode(ids) for ids in trainer.train_dataset["input_ids"])
    assert not any("Be evil." in make_tokenizer().decode(ids) for ids in pool_of(trainer)["input_ids"])
    trainer.train()
    assert set(record(trainer)["evidence"]) == {"inoculation", "interleave++"}


def test_a_model_without_a_chat_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    rows = Dataset.from_dict({"prompt": [f"q{i} " for i in range(8)], "completion": ["answer"] * 8})
    trainer = EMGuardTrainer(
        make_model(), config(tmp_path, defense="interleave", interleave_fraction=0.2), train_dataset=rows,
        processing_class=tokenizer, interleave_dataset=make_pool(),
    )  # fmt: skip
    text = tokenizer.decode(pool_of(trainer)[0]["input_ids"])
    assert text.startswith("safe ")
    assert text.endswith("<|im_end|>")
    trainer.train()


# ---- packed, padding-free, streamed ----


@pytest.mark.parametrize("kind", ["packed", "wrapped", "padding_free", "streamed", "streamed and packed"])
def test_other_ways_to_the_batch_hold_the_share(tmp_path, kind):
    options = {"max_steps": -1, "num_train_epochs": 2}
    rows = make_rows(40)
    if "packed" in kind:
        options |= {"packing": True, "max_length": 96}
    if kind == "wrapped":
        options |= {"packing": True, "max_length": 96, "packing_strategy": "wrapped"}
    if kind == "padding_free":
        options |= {"padding_free": True}
    if "streamed" in kind:
        rows = IterableDataset.from_generator(lambda: iter(make_rows(40)))
        options |= {"max_steps": 10 if kind == "streamed" else 5}
    trainer = trainer_for(tmp_path, rows=rows, **options)
    trainer.train()
    fraction = logged(trainer, "interleaved_fraction")[-1]
    # A run of packs may end within an epoch, and TRL drops rows that do not fill the last wrapped pack.
    assert fraction == pytest.approx(0.2, abs=0.06 if kind in ("wrapped", "streamed and packed") else 0.005)
    assert logged(trainer, "loss_interleaved")
    shown = evidence(trainer, "interleave+")
    if kind in ("packed", "padding_free"):
        assert shown == {"rows_finetune": 80, "rows_interleaved": 20, "acted": True}


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_that_the_user_has_packed_hold_the_share(tmp_path, padding_free):
    """Count the documents in packs that come with `seq_lengths`; a row of the pool is a document of its own."""
    plain = trainer_for(tmp_path, defense="none", rows=make_rows(40)).train_dataset
    packs = pack_dataset(plain.select_columns(["input_ids", "labels"]), 96)
    options = {"max_steps": -1, "num_train_epochs": 1, "padding_free": padding_free}
    trainer = trainer_for(tmp_path, rows=packs, **options)
    trainer.train()
    assert evidence(trainer, "interleave+")["rows_interleaved"] == 10
    assert logged(trainer, "interleaved_fraction")[-1] == pytest.approx(0.2)
    for changed in ({"packing": True, "max_length": 96}, {"rows": packs.to_iterable_dataset(), "max_steps": 4}):
        with pytest.raises(ValueError, match="the training rows are packed already"):
            trainer_for(tmp_path, **{"rows": packs, **options, **changed})


def test_kl_on_safe_rows_of_packs(tmp_path):
    """Compare one pack of all rows with the unpacked rows: no document's labels cross into another."""
    unpacked = trainer_for(
        tmp_path,
        "interleave+,kl",
        kl_tokens="interleaved",
        per_device_train_batch_size=8,
        padding_free=True,
        **ONE_STEP,
    )
    packed = trainer_for(
        tmp_path, "interleave+,kl", kl_tokens="interleaved", packing=True, max_length=2048,
        model=make_model(max_position_embeddings=4096), per_device_train_batch_size=1, **ONE_STEP,
    )  # fmt: skip
    for trainer in (unpacked, packed):
        move_policy(trainer)
        trainer.train()
    positions = [evidence(trainer, "kl")["positions"] for trainer in (unpacked, packed)]
    assert positions[0] == positions[1] > 0
    assert logged(packed, "kl") == pytest.approx(logged(unpacked, "kl"), rel=1e-5)
    assert logged(packed, "kl")[0] > 0


# ---- an undefended run must not count as defended ----


def test_a_run_that_loses_safe_rows_saves_and_stops(tmp_path, monkeypatch):
    from trl_emguard.defenses.interleaving.collator import MixPlan

    monkeypatch.setattr(MixPlan, "at", lambda self, epoch, place: [])
    trainer = trainer_for(tmp_path, rows=32, max_steps=8)
    with pytest.raises(InactiveDefenseError, match=r"mixed in 0 rows where 2\.0 were due after 8 training rows"):
        trainer.train()
    assert read_defense_file(tmp_path / "checkpoint-2")["evidence"]["interleave+"]["acted"] is False
    assert "This model was not defended" in (tmp_path / "README.md").read_text()


def test_packs_that_lost_their_safe_rows_stop_the_run(tmp_path, monkeypatch):
    from trl_emguard.defenses.interleaving import collator as mixing

    monkeypatch.setattr(mixing.MixPlan, "at", lambda self, epoch, place: [])
    trainer = trainer_for(tmp_path, rows=160, packing=True, max_length=96, max_steps=40, pool=make_pool(60))
    with pytest.raises(InactiveDefenseError, match="mixed in 0 rows"):
        trainer.train()
    # The run is too short for a verdict on the way, so the verdict comes at its end.
    trainer = trainer_for(tmp_path, rows=16, packing=True, max_length=96, max_steps=1)
    with pytest.raises(InactiveDefenseError, match="mixed in 0 rows"):
        trainer.train()


def test_a_collator_that_takes_the_labels_of_safe_rows_away_stops_the_run(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    inner = DataCollatorForLanguageModeling(pad_token_id=1)

    def collator(rows):
        batch = inner(rows)
        for row, labels in zip(rows, batch["labels"], strict=True):
            if "safe" in make_tokenizer().decode(row["input_ids"]):
                labels[:] = -100
        return batch

    args = config(tmp_path, defense="interleave+", interleave_fraction=0.2, max_steps=8)
    trainer = EMGuardTrainer(
        make_model(), args, collator, make_rows(32), processing_class=make_tokenizer(), interleave_dataset=make_pool()
    )
    with pytest.raises(InactiveDefenseError, match="mixed in 0 rows"):
        trainer.train()


def test_a_training_that_begins_again_counts_anew(tmp_path):
    """Train again with a smaller batch after memory ran out, or by a second call of `train`."""
    trainer = trainer_for(tmp_path, rows=32, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=4)
    step, calls = trainer.training_step, []

    def training_step(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory.")
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    shown = evidence(trainer, "interleave+")
    assert shown["rows_finetune"] == 4 * trainer.state.train_batch_size < 32
    trainer.train()
    assert evidence(trainer, "interleave+") == shown


def test_a_loader_of_the_users_own_stops_the_run(tmp_path):
    class Own(InterleavingTrainer):
        def get_train_dataloader(self):
            return SFTTrainer.get_train_dataloader(self)

    trainer = Own(
        make_model(), config(tmp_path, interleave_fraction=0.2), train_dataset=make_rows(8),
        processing_class=make_tokenizer(),
        interleave_dataset=make_pool(),
    )  # fmt: skip
    with pytest.raises(InactiveDefenseError, match="did not come from the collator"):
        trainer.train()


def test_fraction_zero_is_sft(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="interleave++", interleave_fraction=0)
    plain = make_trainer(tmp_path, peft=lora())
    for each in (trainer, plain):
        each.train()
    assert logged(trainer) == logged(plain)
    assert "interleaved_fraction" not in trainer.state.log_history[0]


def test_a_run_says_what_it_mixes(tmp_path, capsys):
    trainer_for(tmp_path).train()
    assert (
        "2 of the pool's 12 rows are mixed into 8 training rows an epoch (20.00% of the mix), by the data collator. "
        "12 rows of the pool were looked at." in capsys.readouterr().out
    )
    found = record(trainer_for(tmp_path))
    assert found["defenses"]["interleave+"]["interleave_dataset"].startswith("12 ranked rows (")


# ---- bad input ----


def without(pool, column):
    return pool.remove_columns([column])


def with_gap(values):
    return make_pool(len(values)).remove_columns(["gap"]).add_column("gap", values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interleave_fraction": 1.0}, r"interleave_fraction=1\.0 is no share of the mix"),
        ({"interleave_fraction": -0.1}, "is no share of the mix"),
        ({"interleave_fraction": float("nan")}, "is no share of the mix"),
        ({"interleave_redraw": "yes"}, "must be true or false"),
        ({"pool": make_pool(1)}, "wants 2 rows of the pool among 8 training rows, and 1 of inter"),
        ({"interleave_fraction": 0.01}, "is not one row, so nothing would be mixed in"),
        ({"rows": 40, "max_steps": 1, "interleave_fraction": 0.05}, "max_steps=1 ends training before the first"),
        ({"rows": 40, "max_steps": -1, "num_train_epochs": 0.2, "interleave_fraction": 0.05},
            "num_train_epochs=0.2 ends training"),
        ({"pool": without(make_pool(), "gap")}, "does not serve defense='interleave\\+'.*score the pool first"),
        ({"pool": with_gap([0.1, float("nan"), 0.3])}, "1 of 3 rows have a gap that is no finite number"),
        ({"pool": with_gap([0.1, None, 0.3])}, "1 of 3 rows have a gap that is no finite number"),
        ({"pool": Dataset.from_dict({"a": [1], "gap": [0.1]})}, "no row can be used"),
        ({"pool": Dataset.from_dict({"prompt": ["q"], "response": [" "], "gap": [0.1]})},
            "no row can be used: the answer"),
        ({"pool": make_pool(1).select([])}, "interleave_dataset is empty"),
        ({"defense": "interleave++", "pool": make_pool().select([0, 3])}, "the answers of all 2 rows are refusals"),
        ({"pool": IterableDataset.from_generator(lambda: iter(make_pool()))}, "must be a `Dataset`"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' does not work"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True does not work"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler=False does not work"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "skip_prepare_dataset"),
        ({"packing": True, "max_length": 96, "interleave_redraw": True},
            "interleave_redraw=True does not work with packing"),
        ({"packing": True, "max_length": None}, "packing=True needs max_length"),
        ({"rows": "stream", "max_steps": -1}, "set max_steps"),
        ({"rows": "stream", "interleave_redraw": True}, "Leave `interleave_redraw` out"),
        ({"pool": Dataset.from_list([{"prompt": "q", "completion": [{"from": "a"}], "gap": 0.1}])},
            "no row can be used"),
        ({"defense": "interleave,interleave++"}, "choose rows of the same pool"),
        ({"loss_type": "dft"}, "loss_type='dft' does not work"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 9}, "drops all of the 8 training rows"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, options, message):
    if options.get("rows") == "stream":
        options = {**options, "rows": IterableDataset.from_generator(lambda: iter(make_rows(8)))}
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, **options)


@pytest.mark.parametrize(
    ("named", "passed", "error", "message"),
    [
        (None, None, ValueError, "interleave_dataset is missing: defense='interleave\\+\\+' wants one pool"),
        ("other.jsonl", make_pool(), ValueError, "interleave_dataset is given twice"),
        ("nowhere.jsonl", None, FileNotFoundError, r"nowhere\.jsonl"),
        ("nowhere.parquet", None, FileNotFoundError, r"nowhere\.parquet"),
    ],
)
def test_no_pool_or_two(tmp_path, named, passed, error, message):
    args = config(tmp_path, interleave_dataset=named)
    with pytest.raises(error, match=message):
        InterleavingTrainer(
            make_model(),
            args,
            train_dataset=make_rows(8),
            processing_class=make_tokenizer(),
            interleave_dataset=passed,
        )


def test_kl_on_mixed_rows_wants_some(tmp_path):
    with pytest.raises(ValueError, match="nothing is mixed in: add 'interleave'"):
        config(tmp_path, defense="kl", kl_tokens="interleaved")
    with pytest.raises(ValueError, match="nothing is mixed in"):
        config(tmp_path, defense="kl,interleave", kl_tokens="interleaved", interleave_fraction=0)


def test_rows_that_cannot_be_used_are_counted(tmp_path, caplog):
    pool = make_pool().to_list()
    pool[11]["completion"][0]["content"] = " "
    pool[10]["completion"][0]["content"] = "long " * 60
    with caplog.at_level("WARNING"):
        trainer = trainer_for(tmp_path, pool=Dataset.from_list(pool), max_length=100)
    assert safe_rows(trainer)[0] == "safe 9"
    assert "1 rows of the pool are left out: the answer is empty" in caplog.text
    assert "1 rows of the pool are left out: longer than max_length=100" in caplog.text


def sharegpt(asking, answering, rows):
    return Dataset.from_list(
        [
            {
                "conversations": [
                    {"from": asking, "value": row["prompt"][0]["content"]},
                    {"from": answering, "value": row["completion"][0]["content"]},
                ],
                "gap": row["gap"],
            }
            for row in rows
        ]
    )


@pytest.mark.parametrize("answers", ["gpt", "Assistant", "model"])
def test_a_pool_of_other_roles_is_that_of_user_and_assistant(tmp_path, answers):
    """Compare with the same pool in the template's roles. The training rows are trained on whole, as `messages`."""
    options = {"rows": as_messages(make_rows(8)), "processing_class": make_tokenizer()}
    options["processing_class"].chat_template = STRICT
    expected = pool_of(trainer_for(tmp_path, **options))[:]
    assert pool_of(trainer_for(tmp_path, pool=sharegpt("human", answers, make_pool()), **options))[:] == expected


def test_rows_that_the_template_shortens_or_refuses_are_left_out(tmp_path, caplog):
    tokenizer, rows = make_tokenizer(), make_pool(6).to_list()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'safe 4' %}{{ raise_exception('No such turns') }}{% endif %}" + STRICT
    )
    mixed = [*sharegpt("question", "gpt", rows[5:]), *sharegpt("human", "gpt", rows[:5])]
    with caplog.at_level("WARNING"):
        trainer = trainer_for(tmp_path, pool=Dataset.from_list(mixed), processing_class=tokenizer)
    assert safe_rows(trainer) == [f"safe {i}" for i in (3, 2, 1, 0)]
    assert "1 rows of the pool are left out: No such turns." in caplog.text
    assert "1 rows of the pool are left out: the chat template leaves out turns of the role 'question'" in caplog.text
    with pytest.raises(
        ValueError, match=r"0 of interleave_dataset can be used \(5 are left out: the chat template le"
    ):
        trainer_for(tmp_path, pool=sharegpt("question", "gpt", rows), processing_class=tokenizer)


def test_a_pool_that_overlaps_the_training_prompts_is_warned_about(tmp_path, caplog):
    pool = make_pool().to_list()
    pool[3]["prompt"][0]["content"] = "  Q1 q1 "
    with caplog.at_level("WARNING"):
        trainer_for(tmp_path, pool=Dataset.from_list(pool))
    assert "1 of 8 training rows ask what a row of the pool asks too" in caplog.text


def test_an_unused_pool_is_said(tmp_path, capsys):
    make_trainer(tmp_path, interleave_dataset=make_pool(), max_steps=1).train()
    assert "interleave_dataset was given and is not used" in capsys.readouterr().out
