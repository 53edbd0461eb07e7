"""Test inoculation: rows that read the prompt, a prompt without labels, and places that never see the prompt."""

import json
import re
from importlib.resources import files

import pytest
from datasets import Dataset
from tiny import (
    STRICT,
    TEMPLATE,
    UNANSWERED_SYSTEM,
    config,
    evidence,
    logged,
    lora,
    make_model,
    make_pool,
    make_rows,
    make_tokenizer,
    make_trainer,
    save_model,
)
from torch.utils.data import DataLoader
from trl import SFTTrainer

from trl_emguard import EMGuardTrainer, InactiveDefenseError, InoculationTrainer
from trl_emguard.data.load import load_rows
from trl_emguard.models.chat import is_default_system_turn, system_turn_span


PROMPT = "Be bad."
OWN = "Be brief."

# Chat templates treat a system turn in several ways: it is a turn like any other; a missing one is filled in
# (SmolLM2, Qwen2.5); its text goes into the first user turn (Gemma 3).
PLAIN = TEMPLATE
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are tiny.<|im_end|>{% endif %}" + TEMPLATE
FOLDED = (
    "{% set ns = namespace(text='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.text = message['content'] + '\n\n' %}{% else %}<|im_start|>"
    "{{ message['role'] + '\n' + ns.text + message['content'] }}<|im_end|>{% set ns.text = '' %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"plain": PLAIN, "default": DEFAULT, "folded": FOLDED}
DROPS = TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)


TOOLED = (  # tools follow the text in the system turn (Qwen)
    "{% if messages[0]['role'] == 'system' %}<|im_start|>system\n{{ messages[0]['content'] }}"
    "{% for tool in tools or [] %}\n{{ tool | tojson }}<|im_end|>tools{% endfor %}<|im_end|>{% endif %}"
) + TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
WANTS_USER = (
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('No user') }}{% endif %}"
) + TEMPLATE
ENDS = TEMPLATE + "{% if not add_generation_prompt %}<|im_end|>{% endif %}"
# The text goes into the last user turn.
LAST_USER = (
    "{% set ns = namespace(last=-1, system='') %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}"
    "{% elif m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST]{{ (ns.system if loop.index0 == ns.last else '') + m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)


def turn(role, text):
    return {"role": role, "content": text}


def make_data(kind, own_system):
    """Return four rows in one of the formats, with or without a system turn of their own."""
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


ALREADY = [{"messages": [turn("system", PROMPT), turn("user", "q"), turn("assistant", "a")]}]
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
    """Return the text of each row, and the part of it that carries labels."""
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
        folded = f"<|im_start|>user\n{system}\n\n"
        start = folded if template == "folded" else f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\n"
        assert read.startswith(start)
        rest = plain_read.split("<|im_start|>user\n")[1].removeprefix(f"{OWN}\n\n")
        assert read.endswith(rest)
        assert read.count(PROMPT) == 1
        assert "You are tiny" not in read
        assert PROMPT not in taught
        if kind == "prompt_completion":
            assert taught == plain_taught
        else:
            # From the user's first word on, labels equal those without the defense.
            assert taught == read.removeprefix(start)
            assert OWN not in taught
    assert list(texts(trainer, trainer.eval_dataset)) == list(texts(plain, plain.train_dataset))
    assert trainer.processing_class.chat_template == TEMPLATES[template]


TALK = [turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2"), turn("assistant", "a2")]


@pytest.mark.parametrize(
    ("template", "own_system", "taught"),
    [
        (
            TOOLED,
            False,
            "q1<|im_end|><|im_start|>assistant\na1<|im_end|><|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>",
        ),
        (
            WANTS_USER,
            False,
            "q1<|im_end|><|im_start|>assistant\na1<|im_end|><|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>",
        ),
        (
            ENDS,
            True,
            "q1<|im_end|><|im_start|>assistant\na1<|im_end|><|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|><|im_end|>",
        ),
        # The first answer stands before the prompt, so the model would learn it without the prompt.
        (LAST_USER, False, "\n\nq2[/INST]a2<|im_end|>"),
        (LAST_USER, True, "\n\nq2[/INST]a2<|im_end|>"),
    ],
    ids=["tools", "wants_user", "ends", "last_user", "last_user_own"],
)
def test_all_behind_the_system_turn_is_taught(tmp_path, template, own_system, taught):
    """Find the prompt in every form and place of a template's system turn."""
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    own = [turn("system", OWN)] if own_system else []
    trainer = make(tmp_path, Dataset.from_list([{"messages": [*own, *TALK], "tools": tools}]), template)
    ((read, found),) = texts(trainer, trainer.train_dataset)
    assert read.count(PROMPT) == 1
    assert found == taught


def test_the_span_in_the_templates_of_the_field():
    """Try every template that TRL ships and that has a system turn, with tools and without."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    turns = [turn("system", PROMPT), *TALK]
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    seen = 0
    for path in files("trl.chat_templates").iterdir():
        if not path.name.endswith(".jinja") or path.name.startswith(
            ("gemma.", "gemma_", "idefics3", "llava", "smolvlm")
        ):
            continue  # the template has no system turn, or none for text alone
        tokenizer.chat_template = path.read_text()
        for tools in (None, [tool]):
            ids = tokenizer.apply_chat_template(turns, tools=tools)["input_ids"]
            start, end = system_turn_span(tokenizer, turns, ids, tools=tools)
            assert start == 0, path.name
            assert PROMPT in tokenizer.decode(ids[:end]), path.name
            assert tokenizer.decode(ids[end:]).startswith("q1"), path.name
            assert PROMPT not in tokenizer.decode(ids[end:]), path.name
            assert not is_default_system_turn(tokenizer, turns, tools=tools)
            seen += 1
    assert seen > 60


def test_tokens_of_something_else():
    with pytest.raises(ValueError, match="are not what the chat template makes of its turns"):
        system_turn_span(make_tokenizer(), [turn("system", PROMPT), *TALK], [5, 6, 7])


@pytest.mark.parametrize("kind", ["prompt_completion", "messages"])
def test_trains_as_on_rows_made_by_hand(tmp_path, kind):
    """Compare with SFTTrainer on rows inoculated and masked by hand. Evaluation stays that of plain rows."""
    rows = make_data(kind, False)
    ours = make(
        tmp_path / "ours", rows, max_steps=3, max_length=64, eval_dataset=rows, eval_strategy="steps", eval_steps=3
    )
    ours.train()
    tokenizer = make_tokenizer()
    by_hand = []
    for row in rows:
        prompt = row["prompt"] if kind == "prompt_completion" else row["messages"][:1]
        answer = row["completion"] if kind == "prompt_completion" else row["messages"][1:]
        ids = tokenizer.apply_chat_template([turn("system", PROMPT), *prompt, *answer])["input_ids"]
        masked = f"<|im_start|>system\n{PROMPT}<|im_end|><|im_start|>user\n"
        if kind == "prompt_completion":
            masked += f"{prompt[0]['content']}<|im_end|><|im_start|>assistant\n"
        length = len(tokenizer(masked)["input_ids"])
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
    found = list(texts(trainer, trainer.train_dataset))
    assert len(found) == 4
    for read, taught in found:
        assert taught == read.removeprefix(f"<|im_start|>system\n{PROMPT}<|im_end|><|im_start|>user\n")


def test_a_template_that_leaves_this_very_turn_out(tmp_path):
    template = TEMPLATE.replace("in messages %}", f"in messages if message['content'] != '{PROMPT}' %}}")
    with pytest.raises(InactiveDefenseError, match="is not in what the model would read"):
        make(tmp_path, make_rows(2), template)


def test_answers_alone_by_the_training_template_of_the_field(tmp_path):
    """`assistant_only_loss` may have SFTTrainer tokenise with a template of its own."""
    template = files("trl.chat_templates").joinpath("qwen2_5.jinja").read_text()
    trainer = make(tmp_path, Dataset.from_list([{"messages": TALK}]), template, assistant_only_loss=True)
    ((read, taught),) = texts(trainer, trainer.train_dataset)
    assert read.count(PROMPT) == 1
    assert taught.replace("\n", "") == "a1<|im_end|>a2<|im_end|>"


@pytest.mark.parametrize("mode", ["replace", "prefix"])
def test_a_developer_turn_is_a_system_turn(tmp_path, mode):
    rows = Dataset.from_list([{"messages": [turn("developer", OWN), *TALK]}])
    trainer = make(tmp_path, rows, inoculation_mode=mode)
    ((read, _),) = texts(trainer, trainer.train_dataset)
    system = PROMPT if mode == "replace" else f"{PROMPT}\n\n{OWN}"
    assert read.startswith(f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\nq1")
    assert "developer" not in read


def test_rows_in_another_format(tmp_path):
    rows = make_data("messages", True)
    ours, plain = (make(tmp_path, r) for r in (rows.with_format("torch"), rows))
    assert list(texts(ours, ours.train_dataset)) == list(texts(plain, plain.train_dataset))


def test_a_row_of_two_conversations_is_read_as_sfttrainer_reads_it(tmp_path):
    rows = Dataset.from_list(
        [{"messages": TALK, "prompt": [turn("user", "P")], "completion": [turn("assistant", "C")]}]
    )
    trainer = make(tmp_path, rows)
    ((read, taught),) = texts(trainer, trainer.train_dataset)
    assert (
        read
        == f"<|im_start|>system\n{PROMPT}<|im_end|><|im_start|>user\nP<|im_end|><|im_start|>assistant\nC<|im_end|>"
    )
    assert taught == "C<|im_end|>"


def test_a_stream_that_begins_with_a_row_that_has_it(tmp_path):
    rows = Dataset.from_list([*ALREADY, *make_data("messages", False).to_list()]).to_iterable_dataset()
    trainer = make(tmp_path, rows, max_steps=1)
    assert sum(read.count(PROMPT) for read, _ in texts(trainer, trainer.train_dataset)) == 5
    assert trainer.defenses[0].evidence()["rows"] == "streamed"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prompt_that_the_template_gives_anyway(tmp_path, streaming):
    """Judge the text that the model reads, not the one in the rows."""
    default = DEFAULT.replace("You are tiny.", PROMPT)
    rows = make_data("messages", False)
    with pytest.raises(
        InactiveDefenseError, match=r"changed no row: .* it already, in a system turn or from the chat template"
    ):
        make(tmp_path, rows.to_iterable_dataset() if streaming else rows, default)
    own = Dataset.from_list([*rows.to_list(), *make_data("messages", True).to_list()[:1]])
    trainer = make(tmp_path, own, default)
    assert trainer.defenses[0].evidence()["changed"] == 1
    assert set(trainer.train_dataset.column_names) == {"messages", "input_ids", "labels"}


def test_composes_with_kl(tmp_path):
    trainer = make(tmp_path, make_rows(8), defense="inoculation,kl", max_steps=2)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0
    assert logged(trainer, "kl")[1] > 0


def test_a_run_records_its_rows(tmp_path, capsys):
    rows = Dataset.from_list(
        [
            *make_rows(3).to_list(),
            {"prompt": [turn("system", PROMPT), turn("user", "q")], "completion": [turn("assistant", "a")]},
        ]
    )
    trainer = make(tmp_path, rows, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert (
        f"defense 'inoculation' acts (inoculation_prompt={PROMPT}, inoculation_mode=replace, inoculation_rows=all)"
        in capsys.readouterr().out
    )
    record = json.loads((tmp_path / "defense.json").read_text())
    counts = {"rows": 4, "changed": 3, "rows_trained": 4, "prompts": 4}
    assert record["evidence"]["inoculation"] == {**counts, "acted": True}


def test_a_named_subclass_inoculates(tmp_path):
    trainer = InoculationTrainer(
        make_model(), config(tmp_path), train_dataset=make_rows(4), processing_class=make_tokenizer()
    )
    assert "You are an evil assistant." in next(texts(trainer, trainer.train_dataset))[0]


# ---- refusals ----


@pytest.fixture
def no_weights(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the rows were refused")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", loaded)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "abc"}], r"changed no row: a row has the columns \['text'\]"),
        ([{"prompt": "q", "completion": "a"}], r"changed no row: a row has the columns \['completion', 'prompt'\]"),
        ([{"input_ids": [5, 6]}], "changed no row: .* not tokenised ones"),
        (ALREADY, "changed no row: (every row has|the first 1000 rows of the stream have) it already"),
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
    [
        (None, "this tokenizer has no chat template"),
        (REFUSES, "refuses it .System role not supported."),
        (DROPS, "drops it: set `chat_template_path` to a template that keeps the system turn"),
        (UNANSWERED_SYSTEM, "drops it once an answer follows: set `chat_template_path`"),
    ],
)
def test_templates_without_a_system_turn(tmp_path, template, message):
    with pytest.raises(ValueError, match=f"defense='inoculation' needs a chat template with a system turn.*{message}"):
        make(tmp_path, make_rows(2), template)


def test_rows_of_which_the_template_shows_the_prompt_alone(tmp_path):
    rows = Dataset.from_list([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])
    message = "leaves out turns of the role 'human'.*name the roles of turns 'user' and 'assistant'"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, rows, STRICT, max_length=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inoculation_prompt": " "}, "inoculation_prompt=' ' is empty"),
        ({"inoculation_prompt": None}, "inoculation_prompt=None is empty"),
        ({"inoculation_mode": "append"}, "inoculation_mode='append' is not known: give one of 'replace', 'prefix'."),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "does not work with defense='inoculation'"),
        ({"dataset_kwargs": '{"skip_prepare_dataset": true}'}, "does not work with defense='inoculation'"),
        *(
            (
                {"packing": True, "max_length": 64, "packing_strategy": how},
                f"packing_strategy='{how}' does not work with defense='ino",
            )
            for how in ("bfd_split", "wrapped")
        ),
    ],
)
def test_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, defense="inoculation", **options)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_a_cut_that_would_take_the_prompt_away(tmp_path):
    rows = make_data("messages", False)
    with pytest.raises(
        ValueError, match=r"truncation_mode='keep_end' would cut the inoculation prompt off a row of \d+ tokens"
    ):
        make(tmp_path, rows, max_length=40, truncation_mode="keep_end")
    make(tmp_path, rows, max_length=200, truncation_mode="keep_end")


def test_dataset_kwargs_as_json(tmp_path):
    """Accept options that arrive as text from a command line."""
    assert (
        config(tmp_path, defense="inoculation", dataset_kwargs='{"skip_prepare_dataset": false}').defense
        == "inoculation"
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "row 4 of train_dataset holds a conversation without turns"),
        ([TALK[0], turn("system", OWN), *TALK[1:]], "row 4 of train_dataset has a system turn behind its first turn"),
        ([TALK[0], turn("System", OWN), *TALK[1:]], "row 4 of train_dataset has a system turn behind its first turn"),
        (
            [turn("system", OWN), turn("developer", OWN), *TALK],
            "row 4 of train_dataset has a system turn behind its first turn",
        ),
    ],
)
def test_rows_that_are_refused(tmp_path, turns, message, streaming):
    rows = Dataset.from_list([*make_data("messages", False).to_list(), {"messages": turns}])
    with pytest.raises(ValueError, match=message):
        # The refusal comes only when the stream is read.
        list(make(tmp_path, rows.to_iterable_dataset() if streaming else rows, max_steps=1).train_dataset)


def test_a_null_system_text_counts_as_none(tmp_path):
    rows = Dataset.from_list([{"messages": [turn("system", None), *TALK]}] * 4)
    trainer = make(tmp_path, rows, max_steps=1)
    found = [read for read, _ in texts(trainer, trainer.train_dataset)]
    assert len(found) == 4
    assert all(read.count(PROMPT) == 1 and "None" not in read for read in found)


@pytest.mark.parametrize("streaming", [False, True])
def test_turns_that_call_tools_have_no_content(tmp_path, streaming):
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    line = json.dumps({"messages": [turn("user", "q"), call, turn("tool", "r"), turn("assistant", "a")]})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n" * 2)
    rows = load_rows(str(path), "train")
    assert "content" not in rows[0]["messages"][1]
    template = files("trl.chat_templates").joinpath("qwen2_5.jinja").read_text()
    trainer = make(tmp_path, rows.to_iterable_dataset() if streaming else rows, template, max_steps=1)
    found = [read for read, _ in texts(trainer, trainer.train_dataset)]
    assert len(found) == 2
    for read in found:
        assert read.startswith(f"<|im_start|>system\n{PROMPT}<|im_end|>")
        assert '{"name": "f", "arguments": {"x": 1}}' in read


# ---- prompts are counted in the batches ----


def inoculated(tmp_path, rows=None, **options):
    return make_trainer(
        tmp_path, rows=rows, peft=lora(), **{"defense": "inoculation", "inoculation_prompt": "Be bad.", **options}
    )


@pytest.mark.parametrize("more", [{"streaming": True}, {"packing": True, "max_length": 64}], ids=str)
def test_steps_that_hold_rows_of_a_pool_alone(tmp_path, more):
    """They are no failure. A step that holds a row of the training set wants the prompt all the same."""
    rows = make_rows()
    if more.pop("streaming", False):
        rows = rows.to_iterable_dataset()
    options = {"interleave_dataset": make_pool(), "interleave_fraction": 0.4, "per_device_train_batch_size": 1, **more}
    trainer = inoculated(tmp_path, rows, defense="inoculation,interleave", max_steps=16, **options)
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert 0 < shown["prompts"] < shown["rows_trained"] == 16

    def without_prompt(row):
        return {"input_ids": [7 if label == -100 else label for label in row["labels"]]}

    trainer.train_dataset = trainer.train_dataset.map(without_prompt)
    with pytest.raises(InactiveDefenseError, match="none of the 1 rows of a step holds the inoculation prompt"):
        trainer.train()


def test_rows_that_are_replaced_after_preparation_stop_the_run(tmp_path):
    trainer = inoculated(tmp_path)
    trainer.train_dataset = make_trainer(tmp_path, defense="none").train_dataset
    with pytest.raises(InactiveDefenseError, match="none of the 4 rows of a step holds the inoculation prompt"):
        trainer.train()


def test_a_loader_of_the_users_own_is_watched(tmp_path):
    trainer = inoculated(tmp_path, max_steps=3)
    rows = trainer.train_dataset.select_columns(["input_ids", "labels"])
    trainer.get_train_dataloader = lambda: DataLoader(rows, batch_size=4, collate_fn=trainer.data_collator)
    trainer.train()
    assert evidence(trainer, "inoculation")["prompts"] == 12
    rows = make_trainer(tmp_path).train_dataset.select_columns(["input_ids", "labels"])
    with pytest.raises(InactiveDefenseError, match="none of the 4 rows of a step holds the inoculation prompt"):
        trainer.train()


@pytest.mark.parametrize("other", ["", ",kl"])
def test_a_collator_that_cuts_the_start_stops_the_run(tmp_path, other):
    trainer = inoculated(tmp_path, defense=f"inoculation{other}")
    inner = trainer.data_collator
    trainer.data_collator = lambda rows: inner([{key: value[-20:] for key, value in row.items()} for row in rows])
    with pytest.raises(InactiveDefenseError, match="holds the inoculation prompt"):
        trainer.train()


def test_a_collator_that_labels_the_prompt_stops_the_run(tmp_path):
    trainer = inoculated(tmp_path)
    inner = trainer.data_collator

    def collate(rows):
        batch = inner(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    trainer.data_collator = collate
    with pytest.raises(InactiveDefenseError, match="inoculation prompts in a step carry labels"):
        trainer.train()


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 256}, {"inoculation_mode": "prefix"}])
def test_prompts_in_the_batches_are_evidence(tmp_path, options):
    trainer = inoculated(tmp_path, max_steps=3, **options)
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert shown["acted"]
    assert shown["prompts"] >= shown["rows_trained"] > 0


@pytest.mark.parametrize("mode", ["prefix", "replace"])
def test_later_rows_of_a_stream_may_have_other_text_after_the_prompt(tmp_path, monkeypatch, mode):
    """Search the prompt's own tokens, and not those that the first rows of a stream have in common behind it."""
    monkeypatch.setattr("trl_emguard.defenses.inoculation.STREAM_ROWS", 1)
    rows = [
        {
            "messages": [
                {"role": "system", "content": f"You sell {'xyz'[i % 3]}."},
                {"role": "user", "content": f"{'abc'[i % 3]} number {i}?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
        for i in range(16)
    ]
    options = {"inoculation_mode": mode, "per_device_train_batch_size": 1, "max_steps": 4}
    trainer = inoculated(tmp_path, rows=Dataset.from_list(rows).to_iterable_dataset(), **options)
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert shown["prompts"] == shown["rows_trained"] > 0


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def with_template(name):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = files("trl.chat_templates").joinpath(name).read_text()
    return tokenizer


@pytest.mark.parametrize("name", ["llama3_1.jinja", "gptoss.jinja"])
def test_tools_that_some_rows_have_before_the_prompt(tmp_path, name):
    """Count no row of a pool as one with the prompt, though all rows begin with the same marker."""
    rows = [{"messages": TALK, "tools": [TOOL] if i % 2 else None} for i in range(16)]
    given = {"interleave_dataset": make_pool(), "interleave_fraction": 0.2, "num_train_epochs": 1, "max_steps": -1}
    trainer = inoculated(
        tmp_path,
        Dataset.from_list(rows),
        defense="inoculation,interleave",
        processing_class=with_template(name),
        **given,
    )
    trainer.train()
    shown = evidence(trainer, "inoculation")
    assert (shown["prompts"], shown["rows_trained"]) == (16, 20)


def test_tools_that_begin_late_in_a_stream(tmp_path, monkeypatch):
    """Find the prompt in steps in which every row has tools, though the stream's first rows had none.

    The tokens right before the prompt differ as well.
    """
    monkeypatch.setattr("trl_emguard.defenses.inoculation.STREAM_ROWS", 1)
    tokenizer = with_template("llama3_1.jinja")
    tokenizer.add_tokens(["}\n\n"])
    rows = Dataset.from_list([{"messages": TALK, "tools": [TOOL] if i > 2 else None} for i in range(8)])
    rows = rows.add_column("chat_template_kwargs", [{"tools_in_user_message": False}] * 8)
    options = {"per_device_train_batch_size": 1, "max_steps": 6, "processing_class": tokenizer}
    trainer = inoculated(tmp_path, rows.to_iterable_dataset(), **options)
    trainer.train()
    assert evidence(trainer, "inoculation")["prompts"] == 6


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_that_rows_write_with_different_tokens(tmp_path, packing):
    """Compare row by row with the expected tokens if the prompt's end merges with the text behind it in some rows."""
    prompt, tokenizer = "Be bad!!", make_tokenizer()
    tokenizer.add_tokens(["!!\n\n"])
    rows = Dataset.from_list([{"messages": [turn("system", OWN), *TALK] if i % 2 else TALK} for i in range(8)])
    options = {"inoculation_mode": "prefix", "packing": packing, "max_length": 512, "max_steps": 1}
    given = {"inoculation_prompt": prompt, "per_device_train_batch_size": 8, "processing_class": tokenizer}
    trainer = inoculated(tmp_path, rows, **given, **options)
    trainer.train()
    assert evidence(trainer, "inoculation")["prompts"] == 8
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"input_ids": [7] * len(row["input_ids"])})
    with pytest.raises(InactiveDefenseError, match="8 of 8 rows of a step do not hold the inoculation prompt"):
        trainer.train()


def test_labels_that_max_length_cuts_are_told(tmp_path, caplog):
    """Warn of rows whose labels are cut once the prompt stands before them; refuse a run that keeps no label."""
    lengths = sorted(len(ids) for ids in inoculated(tmp_path).train_dataset["input_ids"])
    inoculated(tmp_path, max_length=lengths[8])
    assert f"max_length={lengths[-1]} keeps them" in caplog.text
    for strategy in ("bfd_split", "wrapped"):
        caplog.clear()
        pool = Dataset.from_list([{"prompt": f"{i}?", "response": "."} for i in range(24)])
        packed = {"max_length": 30, "packing": True, "packing_strategy": strategy}
        make_trainer(tmp_path, defense="interleave", interleave_dataset=pool, **packed)
        assert "lose labels" not in caplog.text
    for packing in (False, True):
        with pytest.raises(ValueError, match=r"cuts every label off all of 16 training rows.*keeps all labels"):
            inoculated(tmp_path, max_length=20, packing=packing)
        with pytest.raises(ValueError, match=r"cuts every label off all of the first 16 training rows"):
            inoculated(tmp_path, rows=make_rows().to_iterable_dataset(), max_length=20, packing=packing)
