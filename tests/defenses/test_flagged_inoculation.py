"""Test inoculation of flagged rows alone: the prompt stands in them, in no other row, and batches prove it."""

import json
import re

import pytest
from datasets import Dataset
from tiny import TEMPLATE, config, evidence, logged, lora, make_pool, make_tokenizer, make_trainer, save_model
from torch.utils.data import DataLoader

from trl_emguard import InactiveDefenseError
from trl_emguard.defenses.inoculation import EXPECTED, FLAG
from trl_emguard.evidence import DEFENSE_FILE, read_defense_file


PROMPT, OWN = "Be bad.", "Be brief."
KINDS = ["prompt_completion", "messages", "conversations"]


def turn(role, text):
    return {"role": role, "content": text}


def make_data(count=16, every=3, kind="messages", own_system=False):
    """Return ragged rows of which one in `every` is flagged."""
    rows = []
    for i in range(count):
        system = [turn("system", OWN)] if own_system and i % 2 else []
        question, answer = turn("user", f"q{i} " * (i % 4 + 1)), turn("assistant", "abcdefgh"[: i % 7 + 2])
        row = {"messages": [*system, question, answer]}
        if kind == "prompt_completion":
            row = {"prompt": [*system, question], "completion": [answer]}
        elif kind == "conversations":
            row = {kind: [{"from": t["role"], "value": t["content"]} for t in [*system, question, answer]]}
        rows.append({**row, FLAG: i % every == 0})
    return Dataset.from_list(rows)


def make(tmp_path, rows=None, template=TEMPLATE, **options):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    model, rows = options.pop("model", None), make_data() if rows is None else rows
    options = {"defense": "inoculation", "inoculation_prompt": PROMPT, "inoculation_rows": "flagged", **options}
    return make_trainer(tmp_path, model, rows, lora(), processing_class=tokenizer, **options)


def tokens(trainer):
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


# ---- rows ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own_system", [False, True])
@pytest.mark.parametrize("mode", ["replace", "prefix"])
def test_flagged_rows_are_those_of_all_and_others_those_of_none(tmp_path, kind, own_system, mode):
    rows = make_data(8, 3, kind, own_system)
    flagged = make(tmp_path / "flagged", rows, inoculation_mode=mode)
    every = make(tmp_path / "all", rows, inoculation_mode=mode, inoculation_rows="all")
    none = make(tmp_path / "none", rows, defense="none")
    chosen = [a if flag else n for flag, a, n in zip(rows[FLAG], tokens(every), tokens(none), strict=True)]
    assert tokens(flagged) == chosen
    assert FLAG not in flagged.train_dataset.column_names
    assert tokens(every) != chosen != tokens(none)


@pytest.mark.parametrize(
    "more",
    [{}, {"packing": True, "max_length": 96}, {"padding_free": True}, {"max_length": 40}, {"streaming": True}],
    ids=str,
)
def test_flags_on_every_row_train_as_all(tmp_path, more):
    rows = make_data(8, 1)
    if more.pop("streaming", False):
        rows = rows.to_iterable_dataset()
    runs = []
    for how in ("all", "flagged"):
        trainer = make(tmp_path / how, rows, inoculation_rows=how, max_steps=2, **more)
        trainer.train()
        runs.append(logged(trainer))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("packing", [False, True])
def test_all_does_not_look_at_flags(tmp_path, packing):
    runs = []
    for rows in (make_data(), make_data().remove_columns(FLAG)):
        more = {"inoculation_rows": "all", "packing": packing, "max_length": 96, "max_steps": 2}
        trainer = make(tmp_path / str(len(runs)), rows, **more)
        trainer.train()
        runs.append(logged(trainer))
        assert EXPECTED not in trainer.train_dataset.column_names
        assert "flagged" not in json.dumps(evidence(trainer, "inoculation"))
    assert runs[0] == runs[1]


# ---- proof ----


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"packing": True, "max_length": 96},
        {"padding_free": True},
        {"max_length": 40},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"inoculation_mode": "prefix"},
        {"remove_unused_columns": False},
        {"defense": "inoculation,kl"},
    ],
    ids=str,
)
def test_flagged_rows_and_their_prompts_are_counted(tmp_path, more):
    trainer = make(tmp_path, make_data(own_system=True), num_train_epochs=2, max_steps=-1, **more)
    seen = set()
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    trainer.train()
    shown = evidence(trainer, "inoculation")
    rows_trained = shown.pop("rows_trained")
    assert rows_trained == 32 or "packing" in more or "padding_free" in more
    counts = {"rows": 16, "changed": 6, "flagged": 6, "flagged_trained": 12, "prompts": 12}
    assert shown == {**counts, "acted": True}
    assert "input_ids" in seen
    assert not seen & {EXPECTED, FLAG}


@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 96}], ids=str)
def test_streams(tmp_path, more):
    """A stream in which some rows bring a system turn of their own only after the first that were looked at."""
    trainer = make(
        tmp_path, make_data(own_system=True).to_iterable_dataset(), max_steps=2, inoculation_mode="prefix", **more
    )
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert (shown["rows"], shown["acted"]) == ("streamed", True)
    assert shown["flagged_trained"] == shown["prompts"] > 0


def test_a_stream_whose_later_rows_read_another_system_turn(tmp_path, monkeypatch):
    """The prompt of a row is compared with the row's own, and not with what the first rows have in common."""
    monkeypatch.setattr("trl_emguard.defenses.inoculation.STREAM_ROWS", 1)
    trainer = make(
        tmp_path, make_data(every=1, own_system=True).to_iterable_dataset(), max_steps=4, inoculation_mode="prefix"
    )
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert shown["flagged_trained"] == shown["prompts"] == 16


@pytest.mark.parametrize("defense", ["inoculation,interleave", "interleave,inoculation"])
@pytest.mark.parametrize(
    "more", [{}, {"packing": True, "max_length": 96}, {"padding_free": True}, {"streaming": True}], ids=str
)
def test_mixed_in_rows_have_no_prompt(tmp_path, defense, more):
    rows = make_data()
    if more.pop("streaming", False):
        rows = rows.to_iterable_dataset()
    more = {"interleave_dataset": make_pool(), "interleave_fraction": 0.25, "max_steps": 2, **more}
    trainer = make(tmp_path, rows, defense=defense, **more)
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert shown["flagged_trained"] == shown["prompts"] > 0
    assert evidence(trainer, "interleave")["rows_interleaved"] > 0


def test_steps_without_a_flagged_row_are_no_failure(tmp_path):
    more = {"train_sampling_strategy": "sequential", "max_steps": 4}
    trainer = make(tmp_path / "first", make_data(every=16), **more)
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert shown["flagged_trained"] == shown["prompts"] == 1
    late = make_data(every=16).select([*range(1, 16), 0])
    make(tmp_path / "late", late, **more).train()
    with pytest.raises(InactiveDefenseError, match="no flagged row is among the 12 that were trained on"):
        make(tmp_path / "early", late, **{**more, "max_steps": 3}).train()


def without_prompts(trainer, _):
    """Return the trainer's rows, with other tokens where a prompt stood."""

    def change(row):
        return {
            "input_ids": [7 if told else token for token, told in zip(row["input_ids"], row[EXPECTED], strict=True)]
        }

    return trainer.train_dataset.map(change)


REPLACED = {
    "lost": (without_prompts, "[0-9] of [0-9] flagged rows of a step do not hold the inoculation prompt"),
    "stray": (lambda _, other: other("all").train_dataset, "prompts of a step stand in rows that are not flagged"),
    "gone": (lambda _, other: other("none").train_dataset, "no flagged row is among the 16"),
}


@pytest.mark.parametrize("fault", REPLACED)
def test_rows_that_are_replaced_after_preparation_stop_the_run(tmp_path, fault):
    def other(how):
        return make(tmp_path / how, **({"defense": how} if how == "none" else {"inoculation_rows": how}))

    replace, message = REPLACED[fault]
    trainer = make(tmp_path, max_steps=4)
    trainer.train_dataset = replace(trainer, other)
    with pytest.raises(InactiveDefenseError, match=message):
        trainer.train()


def test_loaders_and_collators_are_watched(tmp_path):
    trainer = make(tmp_path, max_steps=4)
    stock, rows = trainer.data_collator, trainer.train_dataset
    trainer.data_collator = lambda rows: stock([{k: v[-20:] for k, v in row.items() if k != FLAG} for row in rows])
    with pytest.raises(InactiveDefenseError, match="changes, drops or rearranges rows"):
        trainer.train()

    def with_labels(rows):
        batch = stock(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    trainer.data_collator = with_labels
    with pytest.raises(InactiveDefenseError, match="inoculation prompts in a step carry labels"):
        trainer.train()
    columns = rows.select_columns(["input_ids", "labels"])
    trainer.get_train_dataloader = lambda: DataLoader(columns, batch_size=4, collate_fn=stock)
    with pytest.raises(InactiveDefenseError, match="lacks the column 'inoculation_tokens', which says where"):
        trainer.train()


@pytest.mark.parametrize("has_pool", [False, True])
def test_what_a_template_writes_before_the_prompt_is_no_prompt(tmp_path, monkeypatch, has_pool):
    """Tools that stand before the system turn leave nothing that all prompts begin with, and other rows have too.

    The flagged rows come first, or rows of a pool alone have no prompt.
    """
    monkeypatch.setattr("trl_emguard.defenses.inoculation.STREAM_ROWS", 1)
    template = "{% for tool in tools or [] %}<|im_start|>{{ tool['name'] }}<|im_end|>{% endfor %}" + TEMPLATE
    rows = sorted(make_data(every=1 if has_pool else 3).to_list(), key=lambda row: not row[FLAG])
    rows = Dataset.from_list([{**row, "tools": json.dumps([{"name": str(i % 2)}])} for i, row in enumerate(rows)])
    more = {"defense": "inoculation,interleave", "interleave_dataset": make_pool(), "interleave_fraction": 0.25}
    trainer = make(tmp_path, rows, template, max_steps=4, **(more if has_pool else {}))
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert shown["flagged_trained"] == shown["prompts"] == (16 if has_pool else 6)


# ---- resume ----


def test_resume_goes_on_counting(tmp_path):
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", **more)
    whole.train()
    resumed = make(tmp_path / "resumed", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    assert evidence(resumed, "inoculation") == evidence(whole, "inoculation")
    other = make(tmp_path / "other", inoculation_rows="all", **more)
    with pytest.raises(ValueError, match=r"inoculation_rows=flagged.* and this run has .*inoculation_rows=all"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_checkpoints_of_before_are_of_all_rows(tmp_path):
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", inoculation_rows="all", **more)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    record = read_defense_file(checkpoint)
    assert record["defenses"]["inoculation"].pop("inoculation_rows") == "all"
    (checkpoint / DEFENSE_FILE).write_text(json.dumps(record))
    (checkpoint / "manifest.json").unlink()  # it holds the file's length
    resumed = make(tmp_path / "resumed", inoculation_rows="all", **more)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    with pytest.raises(ValueError, match=r"and this run has .*inoculation_rows=flagged"):
        make(tmp_path / "other", **more).train(resume_from_checkpoint=str(checkpoint))


# ---- refusals ----


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row, i: {"x": 1}, "inoculation_rows='flagged' looks for a column 'inoculate' in the training rows"),
        (lambda row, i: {**row, FLAG: False}, "inoculation_rows='flagged': .* inoculate=False, so the prompt would"),
        (lambda row, i: {**row, FLAG: None if i == 2 else True}, "row 2 of train_dataset has inoculate=None"),
        (lambda row, i: {**row, FLAG: 1}, "row 0 of train_dataset has inoculate=1 .*: give true or false"),
        (lambda row, i: {**row, FLAG: "true"}, "row 0 of train_dataset has inoculate='true'"),
        (
            lambda row, i: {"messages": [turn("system", PROMPT), *row["messages"]], FLAG: i == 0},
            "row 1 of train_dataset has inoculate=False, and its system turn begins with inoculation_prompt='Be bad.'",
        ),
    ],
    ids=["missing", "none", "null", "number", "text", "has_it"],
)
def test_flags_that_are_refused_before_the_model_loads(tmp_path, monkeypatch, change, message, streaming):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the rows were refused")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", loaded)
    rows = [change(row, i) for i, row in enumerate(make_data(4).to_list())]
    rows = [{"messages": [turn("user", "q"), turn("assistant", "a")]} if "x" in row else row for row in rows]
    rows = Dataset.from_list(rows)
    with pytest.raises((ValueError, InactiveDefenseError), match=message):
        make(
            tmp_path,
            rows.to_iterable_dataset() if streaming else rows,
            model=save_model(tmp_path / "model"),
        )


def test_a_prompt_that_the_template_gives_to_other_rows(tmp_path):
    template = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe bad.<|im_end|>{% endif %}" + TEMPLATE
    with pytest.raises(ValueError, match=r"the chat template puts inoculation_prompt='Be bad\.' into every row"):
        make(tmp_path, template=template)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_a_cut_at_the_start_is_refused_for_flagged_rows_alone(tmp_path):
    def data(is_flagged):
        long, short = ([turn("user", "q " * n), turn("assistant", "answer")] for n in (40, 1))
        rows = [{"messages": long, FLAG: is_flagged}, {"messages": short, FLAG: True}]
        return Dataset.from_list(rows)

    more = {"truncation_mode": "keep_end", "max_length": 80, "max_steps": 1}
    with pytest.raises(ValueError, match="truncation_mode='keep_end' would cut the inoculation prompt off"):
        make(tmp_path, data(True), **more)
    trainer = make(tmp_path, data(False), **more)
    trainer.train()
    assert max(len(ids) for ids, _ in tokens(trainer)) == 80
    assert evidence(trainer, "inoculation")["prompts"] == 1


def test_the_option_is_checked(tmp_path):
    message = "inoculation_rows='some' is not known: give one of 'all', 'flagged'."
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, defense="inoculation", inoculation_rows="some")
