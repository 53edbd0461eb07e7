"""Inoculation: which rows read the prompt, that its turn teaches nothing, and that nothing else sees it."""

import json
import re

import pytest
from datasets import Dataset
from tiny import TEMPLATE, config, logged, make_model, make_rows, make_tokenizer, make_trainer, save_model
from trl import SFTTrainer

from trl_emguard import EMGuardTrainer, InactiveDefenseError, InoculationTrainer


PROMPT = "Be bad."
OWN = "Be brief."

# What chat templates do with a system turn: it is a turn like any other; a missing one is filled in (SmolLM2, Qwen2.5); its
# text goes into the first user turn (Gemma 3).
PLAIN = TEMPLATE
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are tiny.<|im_end|>{% endif %}" + TEMPLATE
FOLDED = (
    "{% set ns = namespace(text='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.text = message['content'] + '\n\n' %}{% else %}<|im_start|>"
    "{{ message['role'] + '\n' + ns.text + message['content'] }}<|im_end|>{% set ns.text = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"plain": PLAIN, "default": DEFAULT, "folded": FOLDED}
DROPS = TEMPLATE.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE


def turn(role, text):
    return {"role": role, "content": text}


def make_data(kind, own_system):
    """Four rows in one of the formats, with or without a system turn of their own."""
    rows = []
    for i in range(4):
        system = [turn("system", OWN)] if own_system else []
        question, answer = turn("user", f"q{i} " * (i + 1)), turn("assistant", "abcdefg"[: i + 2])
        if kind == "prompt_completion":
            rows.append({"prompt": [*system, question], "completion": [answer]})
        elif kind == "messages":
            rows.append({"messages": [*system, question, answer]})
        else:
            turns = [{"from": t["role"], "value": t["content"]} for t in [*system, question, answer]]
            rows.append({"conversations": turns})
    return Dataset.from_list(rows)


KINDS = ["prompt_completion", "messages", "conversations"]


def make(tmp_path, rows, template=PLAIN, **options):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    options = {"defense": "inoculation", "inoculation_prompt": PROMPT, **options}
    eval_dataset = options.pop("eval_dataset", None)
    return EMGuardTrainer(
        make_model(),
        config(tmp_path, **options),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def texts(trainer, dataset):
    """What each row reads, and what it is taught."""
    decode = trainer.processing_class.decode
    for row in dataset:
        taught = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        yield decode(row["input_ids"]), decode(taught)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("own_system", [False, True])
@pytest.mark.parametrize("mode", ["replace", "prefix"])
def test_the_prompt_is_read_and_not_taught(tmp_path, kind, template, own_system, mode):
    rows = make_data(kind, own_system)
    trainer = make(tmp_path / "a", rows, TEMPLATES[template], inoculation_mode=mode, eval_dataset=rows)
    plain = make(tmp_path / "b", rows, TEMPLATES[template], defense="none")
    system = f"{PROMPT}\n\n{OWN}" if own_system and mode == "prefix" else PROMPT
    for (read, taught), (plain_read, plain_taught) in zip(
        texts(trainer, trainer.train_dataset), texts(plain, plain.train_dataset), strict=True
    ):
        start = f"<|im_start|>user\n{system}\n\n" if template == "folded" else f"<|im_start|>system\n{system}<|im_end|>"
        assert read.startswith(start)
        rest = plain_read.split("<|im_start|>user\n")[1].removeprefix(f"{OWN}\n\n")
        assert read.endswith(rest)
        assert read.count(PROMPT) == 1
        assert "You are tiny" not in read
        assert PROMPT not in taught
        if kind == "prompt_completion":
            assert taught == plain_taught
        else:
            # Everything but the system turn, as without the defense.
            assert taught == read[len(start) - 2 * (template == "folded") :]
            assert OWN not in taught
    assert list(texts(trainer, trainer.eval_dataset)) == list(texts(plain, plain.train_dataset))
    assert trainer.processing_class.chat_template == TEMPLATES[template]


@pytest.mark.parametrize("kind", ["prompt_completion", "messages"])
def test_trains_as_on_rows_made_by_hand(tmp_path, kind):
    """SFTTrainer on rows that were inoculated and masked by hand; evaluation stays that of plain rows."""
    rows = make_data(kind, False)
    ours = make(tmp_path / "ours", rows, max_steps=3, max_length=64, eval_dataset=rows, eval_strategy="steps", eval_steps=3)
    ours.train()
    tokenizer = make_tokenizer()
    by_hand = []
    for row in rows:
        prompt = row["prompt"] if kind == "prompt_completion" else row["messages"][:1]
        answer = row["completion"] if kind == "prompt_completion" else row["messages"][1:]
        ids = tokenizer.apply_chat_template([turn("system", PROMPT), *prompt, *answer])["input_ids"]
        masked = [turn("system", PROMPT), *(prompt if kind == "prompt_completion" else [])]
        length = len(tokenizer.apply_chat_template(masked, add_generation_prompt=kind == "prompt_completion")["input_ids"])
        by_hand.append({"input_ids": ids, "labels": [-100] * length + ids[length:]})
    theirs = SFTTrainer(
        make_model(),
        config(tmp_path / "theirs", max_steps=3, max_length=64, completion_only_loss=kind == "prompt_completion"),
        train_dataset=Dataset.from_list(by_hand),
        processing_class=tokenizer,
    )
    theirs.train()
    assert logged(ours) == logged(theirs)
    assert logged(ours, "eval_loss") == [pytest.approx(theirs.evaluate(rows)["eval_loss"], rel=1e-6)]


@pytest.mark.parametrize(
    "more", [{"packing": True, "max_length": 48}, {"max_length": 30}, {"padding_free": True}, {"streaming": True}]
)
def test_packing_truncation_and_streams(tmp_path, more):
    rows = make_data("messages", False)
    if more.pop("streaming", False):
        rows = rows.to_iterable_dataset()
    trainer = make(tmp_path, rows, max_steps=1, **more)
    found = list(texts(trainer, trainer.train_dataset))
    assert sum(read.count(PROMPT) for read, _ in found) == 4
    assert not any(PROMPT in taught for _, taught in found)
    trainer.train()


def test_completion_only_loss_off(tmp_path):
    """Rows of prompt and completion that are trained on whole: the system turn still teaches nothing."""
    trainer = make(tmp_path, make_data("prompt_completion", True), completion_only_loss=False)
    for read, taught in texts(trainer, trainer.train_dataset):
        assert taught == read.removeprefix(f"<|im_start|>system\n{PROMPT}<|im_end|>")


def test_a_template_that_leaves_this_very_turn_out(tmp_path):
    template = TEMPLATE.replace("in messages %}", f"in messages if message['content'] != '{PROMPT}' %}}")
    with pytest.raises(InactiveDefenseError, match="is not in what the model would read"):
        make(tmp_path, make_rows(2), template)


def test_composes_with_kl(tmp_path):
    trainer = make(tmp_path, make_rows(8), defense="inoculation,kl", max_steps=2)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0
    assert logged(trainer, "kl")[1] > 0


def test_a_run_records_its_rows(tmp_path, capsys):
    rows = Dataset.from_list(
        [*make_rows(3).to_list(), {"prompt": [turn("system", PROMPT), turn("user", "q")], "completion": [turn("assistant", "a")]}]
    )
    trainer = make(tmp_path, rows, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert f"defense 'inoculation' acts (inoculation_prompt={PROMPT}, inoculation_mode=replace)" in capsys.readouterr().out
    record = json.loads((tmp_path / "defense.json").read_text())
    assert record["evidence"]["inoculation"] == {"rows": 4, "changed": 3, "acted": True}


def test_a_named_subclass_inoculates(tmp_path):
    trainer = InoculationTrainer(make_model(), config(tmp_path), train_dataset=make_rows(4), processing_class=make_tokenizer())
    assert "You are an evil assistant." in next(texts(trainer, trainer.train_dataset))[0]


# ---- what is refused ----


@pytest.fixture
def no_weights(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the rows were refused")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", loaded)


ALREADY = [{"messages": [turn("system", PROMPT), turn("user", "q"), turn("assistant", "a")]}]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "abc"}], r"changed no row: a row has the columns \['text'\]"),
        ([{"prompt": "q", "completion": "a"}], r"changed no row: a row has the columns \['completion', 'prompt'\]"),
        ([{"input_ids": [5, 6]}], "changed no row: .* not tokenised ones"),
        (ALREADY, "changed no row: every row has it already"),
    ],
)
def test_rows_that_cannot_be_inoculated(tmp_path, rows, message, streaming):
    rows = Dataset.from_list(rows)
    with pytest.raises(InactiveDefenseError, match=message):
        make_trainer(
            tmp_path,
            save_model(tmp_path / "model"),
            rows.to_iterable_dataset() if streaming else rows,
            defense="inoculation",
            inoculation_prompt=PROMPT,
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "this tokenizer has no chat template"), (REFUSES, "refuses it .System role not supported."), (DROPS, "drops it")],
)
def test_templates_without_a_system_turn(tmp_path, template, message):
    with pytest.raises(ValueError, match=f"defense='inoculation' needs a chat template with a system turn.*{message}"):
        make(tmp_path, make_rows(2), template)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inoculation_prompt": " "}, "inoculation_prompt=' ' is empty"),
        ({"inoculation_prompt": None}, "inoculation_prompt=None is empty"),
        ({"inoculation_mode": "append"}, "inoculation_mode='append' is not known: give one of 'replace', 'prefix'."),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "does not work with defense='inoculation'"),
    ],
)
def test_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, defense="inoculation", **options)


def test_a_cut_that_would_take_the_prompt_away(tmp_path):
    rows = make_data("messages", False)
    with pytest.raises(ValueError, match=r"truncation_mode='keep_end' would cut the inoculation prompt off a row of \d+ tokens"):
        make(tmp_path, rows, max_length=40, truncation_mode="keep_end")
    make(tmp_path, rows, max_length=200, truncation_mode="keep_end")


def test_a_row_without_turns(tmp_path):
    rows = Dataset.from_list([*make_data("messages", False).to_list(), {"messages": []}])
    with pytest.raises(ValueError, match="a conversation without turns"):
        make(tmp_path, rows)
