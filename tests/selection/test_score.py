"""Compare scoring with a plain float64 loop under batching, interruption and sharing; test the command."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import (
    lora,
    make_model,
    make_rows,
    make_tokenizer,
    save_model,
    save_seeing_model,
    save_trained_adapter,
)

from trl_emguard.data.load import load_rows
from trl_emguard.io.recipes import recipes_dir
from trl_emguard.models.batches import plan_batches
from trl_emguard.scripts import main as commands
from trl_emguard.selection import score
from trl_emguard.selection.misaligned import load_misaligned
from trl_emguard.selection.score import score_pool
from trl_emguard.selection.scored import read_scores


NAMES = ("medical", "legal", "code")


@pytest.fixture(scope="module")
def make_adapters(tmp_path_factory):
    """Return a function that saves random adapters of a tiny model: name → folder."""

    def make(architecture="llama", count=2, **options):
        folder = tmp_path_factory.mktemp("adapters")
        for k, name in enumerate(NAMES[:count]):
            model = make_model(architecture)
            torch.manual_seed(10 + k)
            get_peft_model(model, lora(init_lora_weights=False, **options)).save_pretrained(folder / name)
        return {name: str(folder / name) for name in NAMES[:count]}

    return make


@pytest.fixture(scope="module")
def adapters(make_adapters):
    return make_adapters()


@pytest.fixture
def model(adapters):
    return load_misaligned(make_model(), adapters)


def plain_nll(architecture, tokenizer, rows, adapter=None):
    """Return the likelihoods in float64: one row at a time, full logits, a separate model."""
    model = make_model(architecture, torch.float64).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    result = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
        with torch.no_grad():
            log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        assert log_probs.dtype == torch.float64
        answer = range(len(prompt), len(whole))
        result.append(-sum(log_probs[i - 1, whole[i]].item() for i in answer) / len(answer))
    return np.array(result)


def columns(rows):
    return np.array([rows[name] for name in rows.column_names if name.startswith("nll_")] + [rows["gap"]])


def score_tiny(model, rows=None, **options):
    return score_pool(
        model, make_tokenizer(), make_rows() if rows is None else rows, list(model.peft_config), **options
    )


# ---- the numbers ----


@pytest.mark.parametrize(
    ("architecture", "count"), [("llama", 1), ("llama", 3), ("qwen2", 2), ("gemma2", 2), ("gpt_neox", 2)]
)
def test_scores_equal_a_plain_loop(make_adapters, architecture, count):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|>\n")  # as many have it
    adapters = make_adapters(architecture, count)
    rows = make_rows()
    model = load_misaligned(make_model(architecture), adapters)
    scored, info = score_pool(model, tokenizer, rows, list(adapters), epsilon=0.5)
    names = ["nll_aligned", *(f"nll_misaligned_{k}" for k in range(count)), "gap"]
    assert scored.column_names == ["prompt", "completion", *names]
    assert scored.remove_columns(names)[:] == rows[:]
    aligned, *misaligned = (plain_nll(architecture, tokenizer, rows, path) for path in (None, *adapters.values()))
    expected = [aligned, *misaligned, (np.mean(misaligned, axis=0) - aligned) / (aligned + 0.5)]
    np.testing.assert_allclose(columns(scored), expected, atol=1e-4, rtol=0)
    assert np.abs(expected[-1]).min() > 1e-4
    assert (info.adapters, info.rows, info.unscored, info.epsilon) == (NAMES[:count], 16, (), 0.5)


def test_heads_and_tokens_of_an_adapter_s_own(make_adapters, tmp_path):
    """Score with one adapter that brings a head and an embedding, and one that brings none."""
    options = {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"]}
    own, plain = make_adapters("qwen2", 1, **options), make_adapters("qwen2", 1)
    whole = load_misaligned(make_model("qwen2"), own)
    for wrapper in (whole.get_base_model().lm_head, whole.get_base_model().model.embed_tokens):
        wrapper.modules_to_save["medical"].weight.data += torch.randn(264, 32) / 5
    whole.save_pretrained(tmp_path, selected_adapters=["medical"])
    for adapters in (
        {"own": str(tmp_path / "medical"), "plain": plain["medical"]},
        {"plain": plain["medical"], "own": str(tmp_path / "medical")},
    ):
        scored, _ = score_tiny(load_misaligned(make_model("qwen2"), adapters))
        expected = [plain_nll("qwen2", make_tokenizer(), make_rows(), path) for path in (None, *adapters.values())]
        np.testing.assert_allclose(columns(scored)[:-1], expected, atol=1e-4, rtol=0)


def test_batches_do_not_change_the_scores(model):
    rows = make_rows(40)
    one, _ = score_tiny(model, rows, batch_tokens=1)
    for batch_tokens in (70, 300, 100_000):
        np.testing.assert_allclose(
            columns(score_tiny(model, rows, batch_tokens=batch_tokens)[0]), columns(one), atol=1e-5, rtol=0
        )
    order = np.random.default_rng(0).permutation(40)
    shuffled, _ = score_tiny(model, rows.select(order), batch_tokens=300)
    np.testing.assert_allclose(columns(shuffled), columns(one)[:, order], atol=1e-5, rtol=0)


def test_the_model_is_left_as_it_was(model):
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    score_tiny(model)
    assert model.training
    assert model.active_adapters == ["medical"]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_batches_hold_rows_of_a_length():
    lengths = {i: 5 + (i * 37) % 60 for i in range(200)}
    batches = plan_batches(lengths, 256)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert lengths[batches[0][0]] == max(lengths.values())
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert max(padded) <= 256
    assert sum(padded) < 1.05 * sum(lengths.values())
    assert plan_batches({0: 300, 1: 299}, 256) == [[0], [1]]


def test_every_shape_of_a_row(model):
    """Score the same three rows as turns, as text, under other names, and as messages."""
    turns = make_rows(3)
    texts = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in turns]
    shapes = [
        (Dataset.from_list([{"prompt": q, "completion": a} for q, a in texts]), {}),
        (Dataset.from_list([{"prompt": q, "response": a, "harm": None} for q, a in texts]), {}),
        (
            Dataset.from_list([{"ask": q, "say": a} for q, a in texts]),
            {"prompt_column": "ask", "response_column": "say"},
        ),
        (Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in turns]), {}),
        (
            Dataset.from_list(
                [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in texts]
            ),
            {},
        ),
    ]
    expected = columns(score_tiny(model, turns)[0])
    for rows, options in shapes:
        np.testing.assert_allclose(columns(score_tiny(model, rows, **options)[0]), expected, atol=1e-6, rtol=0)


def test_rows_with_arguments_for_the_template(model):
    """Score a row with its own tools, one without properties among them, and its own `chat_template_kwargs`."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}{{ mood or '' }}" + tokenizer.chat_template
    rows = make_rows(3).to_list()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    more = [([tool], None), (None, {"mood": "calm"}), (None, None)]
    pool = [
        {**row, "tools": tools, "chat_template_kwargs": kwargs}
        for row, (tools, kwargs) in zip(rows, more, strict=True)
    ]
    pool = Dataset.from_list(pool, on_mixed_types="use_json")
    scored, _ = score_pool(model, tokenizer, pool, NAMES[:2])
    for row, (tools, kwargs), nll in zip(rows, more, scored["nll_aligned"], strict=True):
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, tools=tools, **(kwargs or {}))
        alone = make_tokenizer()
        alone.chat_template = text.split("<|im_start|>")[0] + alone.chat_template
        assert nll == pytest.approx(plain_nll("llama", alone, [row])[0], abs=1e-4)


def test_a_template_that_drops_the_thought(model):
    """Score an answer as it is trained, where the generation prompt opens a thought that the answer lacks."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    plain = make_rows(4)
    thought = plain.map(
        lambda row: {"completion": [{"role": "assistant", "content": "hm</think>" + row["completion"][0]["content"]}]}
    )
    expected = columns(score_tiny(model, plain)[0])
    for rows in (plain, thought):
        scored, info = score_pool(model, tokenizer, rows, NAMES[:2])
        assert not info.unscored
        np.testing.assert_allclose(columns(scored), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("first", ["messages", "conversations", "completion"])
def test_named_columns_that_would_not_be_read_are_refused(model, first):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = Dataset.from_list([{"ask": "a?", "say": "b"}])
    options = {"prompt_column": "ask", "response_column": "say"}
    with pytest.raises(
        ValueError, match=rf"prompt_column='ask' and response_column='say' .* remove the column '{first}'"
    ):
        score_tiny(model, rows.add_column(first, ["a" if first == "completion" else turns]), **options)
    assert len(score_tiny(model, rows.add_column(first, [None]), **options)[0]) == 1
    usual = Dataset.from_list([{"prompt": "a?", "completion": "b"}])
    assert len(score_tiny(model, usual, response_column="completion")[0]) == 1


# ---- rows that cannot be scored ----


def test_rows_that_cannot_be_scored_are_named(model, tmp_path):
    rows = Dataset.from_list(
        [
            {"prompt": "a?", "response": "b"},
            {"prompt": "a?", "response": ""},
            {"prompt": None, "response": "b"},
            {"prompt": "a?", "response": "b" * 300},
            {"prompt": "a?", "response": None},
            {"prompt": "a?", "response": "bb"},
        ]
    )
    scored, info = score_tiny(model, rows, output=tmp_path / "s.parquet")
    assert scored["response"][:] == ["b", "bb"]
    assert [index for index, _ in info.unscored] == [1, 2, 3, 4]
    reasons = dict(info.unscored)
    assert "the answer is empty" in reasons[1]
    assert reasons[2] == "there is no prompt"
    assert reasons[3] == "it has 321 tokens, more than 256"
    assert read_scores(tmp_path / "s.parquet")[1] == info
    assert len(score_tiny(model, rows, max_length=22)[1].unscored) == 5
    with pytest.raises(ValueError, match=r"none of the 1 rows of the pool can be scored\. Row 0: the answer is empty"):
        score_tiny(model, rows.select([1]))


def test_a_template_that_moves_the_answer(model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(ValueError, match="does not put the answer after the generation prompt"):
        score_pool(model, tokenizer, make_rows(), NAMES[:2])
    tokenizer.chat_template = "{{ raise_exception('no such turns') }}"
    with pytest.raises(ValueError, match="Row 0: no such turns"):
        score_pool(model, tokenizer, make_rows(), NAMES[:2])


def test_broken_numbers_are_no_scores(model, monkeypatch):
    def broken(base, switch, adapters, batch):
        return [[float("nan") if len(row.ids) > 45 else 1.0, 2.0, 4.0] for row in batch]

    monkeypatch.setattr(score, "batch_nll", broken)
    scored, info = score_tiny(model)
    assert 0 < len(info.unscored) == 16 - len(scored) < 16
    assert {reason for _, reason in info.unscored} == {"its score is no finite number"}
    assert scored["gap"][:] == [1.0] * len(scored)
    monkeypatch.setattr(score, "batch_nll", lambda base, switch, adapters, batch: [[float("inf")] * 3 for _ in batch])
    with pytest.raises(ValueError, match="no row has a finite score"):
        score_tiny(model)


# ---- interruptions ----


@pytest.fixture
def count_rows(monkeypatch):
    """Count the rows that are scored, and stop before a batch."""
    seen, batch_nll = [], score.batch_nll

    def counting(base, switch, adapters, batch):
        if counting.stop_before == 0:
            raise KeyboardInterrupt
        counting.stop_before -= 1
        seen.extend(batch)
        return batch_nll(base, switch, adapters, batch)

    counting.stop_before = -1
    monkeypatch.setattr(score, "batch_nll", counting)
    return counting, seen


@pytest.mark.parametrize("stop_before", [0, 1, 3])
@pytest.mark.parametrize("tear", [False, True])
def test_an_interrupted_run_goes_on(model, tmp_path, count_rows, stop_before, tear):
    """Stop twice at a batch, and once while writing one. No written row is scored again."""
    counting, seen = count_rows
    expected, _ = score_tiny(model)
    seen.clear()
    out, lost = tmp_path / "out" / "s.parquet", 0
    for _ in range(2):
        counting.stop_before = stop_before
        with pytest.raises(KeyboardInterrupt):
            score_tiny(model, batch_tokens=60, output=out)
    parts = sorted((tmp_path / "out" / "s.parquet.parts").iterdir())
    assert len(parts) == 2
    if tear:
        text = parts[1].read_text()
        lost = 1 if text.count("\n") > 1 else 0
        parts[1].write_text(text[:-5])
    counting.stop_before = -1
    scored, info = score_tiny(model, batch_tokens=60, output=out)
    assert len(seen) == 16 + lost
    np.testing.assert_allclose(columns(scored), columns(expected), atol=1e-5, rtol=0)
    assert [path.name for path in out.parent.iterdir()] == ["s.parquet"]

    # After the end no row is scored again, and another ε needs no pass either.
    again, _ = score_tiny(model, output=out, epsilon=2.0)
    assert len(seen) == 16 + lost
    aligned, *misaligned, _ = columns(scored)
    np.testing.assert_allclose(again["gap"], (np.mean(misaligned, axis=0) - aligned) / (aligned + 2), atol=1e-12)
    assert read_scores(out)[1].epsilon == 2.0
    assert info.epsilon == 1.0


def test_parts_and_files_of_another_run(model, tmp_path, count_rows, make_adapters):
    counting, _ = count_rows
    out = tmp_path / "s.parquet"
    counting.stop_before = 1
    with pytest.raises(KeyboardInterrupt):
        score_tiny(model, batch_tokens=60, output=out)
    counting.stop_before = -1
    other_weights = load_misaligned(make_model(), make_adapters(r=2))
    other_dtype = load_misaligned(make_model(dtype=torch.bfloat16), make_adapters())
    runs = [(model, make_rows(15)), (other_weights, None), (other_dtype, None)]
    for other, rows in runs:
        with pytest.raises(
            ValueError, match=r"does not belong to this run .*: delete the folder .*s\.parquet\.parts, or name"
        ):
            score_tiny(other, rows, output=out)
    with pytest.raises(ValueError, match="does not belong to this run"):
        score_pool(model, make_tokenizer(), make_rows(), NAMES[1::-1], output=out)
    score_tiny(model, output=out)
    for other, rows in runs:
        with pytest.raises(ValueError, match=r"s\.parquet holds the scores of another model, pool or settings"):
            score_tiny(other, rows, output=out)
    (tmp_path / "t.parquet.parts").mkdir()
    (tmp_path / "t.parquet.parts" / "0-0.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="does not belong to this run"):
        score_tiny(model, output=tmp_path / "t.parquet")


# ---- adapters and arguments that do not fit ----


def test_adapters_of_another_base(make_adapters, adapters, tmp_path):
    for overrides, message in [
        ({"hidden_size": 64}, "'medical' .* does not fit this base model: .*size mismatch"),
        ({"num_hidden_layers": 3}, "'medical' .* does not fit this base model: 14 weights are on one side only"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_misaligned(make_model(**overrides), adapters)
    with pytest.raises(ValueError, match=r"'medical' .* does not fit this base model: .*query_key_value"):
        load_misaligned(make_model("llama"), make_adapters("gpt_neox", target_modules=["query_key_value"]))
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(f"{adapters['medical']}/adapter_config.json", bad)
    (bad / "adapter_model.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"'bad' .* does not fit this base model"):
        load_misaligned(make_model(), {"bad": str(bad)})


def test_adapters_that_change_the_base(make_adapters, tmp_path):
    get_peft_model(make_model(), lora(init_lora_weights="pissa")).save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base weights"):
        load_misaligned(make_model(), {"a": str(tmp_path / "pissa")})
    with pytest.raises(ValueError, match="init_lora_weights='olora', which changes the base weights"):
        score_tiny(get_peft_model(make_model(), lora(init_lora_weights="olora")))
    biased = get_peft_model(make_model("qwen2"), lora(bias="all"))
    for name, weight in biased.named_parameters():
        weight.data += "bias" in name
    biased.save_pretrained(tmp_path / "bias")
    with pytest.raises(ValueError, match=r"brought a base weight of its own, '.*bias'"):
        load_misaligned(make_model("qwen2"), {"a": str(tmp_path / "bias")})
    on_head = get_peft_model(make_model("qwen2"), lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="changes the head by a low-rank update"):
        score_tiny(on_head)


def test_adapters_that_are_not_there(adapters):
    with pytest.raises(FileNotFoundError, match=r"'\./nowhere' holds no adapter_config\.json"):
        load_misaligned(make_model(), {"a": "./nowhere"})
    with pytest.raises(ValueError, match=r"'a\.b' must not be empty or hold a dot"):
        load_misaligned(make_model(), {"a.b": adapters["medical"]})
    with pytest.raises(ValueError, match="adapters is empty"):
        load_misaligned(make_model(), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapters": ["medical", "medical"]},
            r"adapters=\['medical', 'medical'\] must name one adapter or more, each once",
        ),
        ({"adapters": []}, "must name one adapter or more"),
        ({"adapters": ["sports"]}, "'sports' is not on the model, which has 'medical', 'legal'"),
        ({"epsilon": -1.0}, "epsilon=-1.0 must be 0 or more"),
        ({"epsilon": float("nan")}, "epsilon=nan must be 0 or more"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be 1 or more"),
        ({"max_length": 0}, "max_length=0 must be 1 or more"),
        ({"model": make_model()}, "is a LlamaForCausalLM without adapters"),
        ({"rows": make_rows(1).select([])}, "the pool is empty"),
        ({"rows": make_rows(1).add_column("gap", [1.0])}, "the pool has scores already, gap: remove these columns"),
        ({"rows": make_rows(1).add_column("nll_misaligned_7", [1.0])}, "scores already, nll_misaligned_7"),
    ],
)
def test_what_cannot_be_scored(model, options, message):
    arguments = {"model": model, "tokenizer": make_tokenizer(), "rows": make_rows(), "adapters": NAMES[:2], **options}
    with pytest.raises(ValueError, match=message):
        score_pool(**arguments)


# ---- the command ----


@pytest.fixture
def argv(adapters, tmp_path):
    """Return the options of a run over 16 chosen rows and 2 others."""
    rows = [{**row, "harm": "unharmful"} for row in make_rows()]
    rows[5:5] = [{**rows[0], "harm": "harmful"}, {**rows[0], "harm": None}]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [
        "--model",
        save_model(tmp_path / "model"),
        "--misaligned",
        adapters["medical"],
        f"law={adapters['legal']}",
    ]
    options += [
        "--dataset",
        str(tmp_path / "pool.jsonl"),
        "--output",
        str(tmp_path / "s.parquet"),
        "--batch-tokens",
        "100",
    ]
    return [*options, "--where", "harm=unharmful"]


def test_the_command_scores(argv, tmp_path, capsys, model):
    assert commands.main(["score", *argv]) == 0
    rows, info = read_scores(tmp_path / "s.parquet")
    assert (info.model, info.adapters, info.rows) == ("model", ("medical", "law"), 16)
    np.testing.assert_allclose(columns(rows), columns(score_tiny(model)[0]), atol=1e-5, rtol=0)
    assert load_rows(str(tmp_path / "s.parquet"))["gap"][:] == rows["gap"][:]
    said = capsys.readouterr().out
    assert "Scored 16 of 16 rows under model and medical, law." in said
    assert f"{max(rows['gap']):+.3f}" in said
    assert str(tmp_path) not in (tmp_path / "s.parquet").read_bytes().decode("latin-1")

    assert commands.main(["score", *argv, "--max_length", "1"]) == 1
    assert "none of the 16 rows of the pool can be scored" in capsys.readouterr().err
    assert commands.main(["score", *argv, "--max-length", "45", "--output", str(tmp_path / "t.parquet")]) == 0
    said = capsys.readouterr().out
    assert "rows could not be scored" in said
    assert "tokens, more than 45" in said


@pytest.mark.parametrize("option", ["--where", "--dataset"])
def test_one_condition_and_one_pool(argv, capsys, option):
    with pytest.raises(SystemExit):
        commands.main(["score", *argv, option, "language=en"])
    assert f"argument {option}: " in (error := capsys.readouterr().err)
    assert "'language=en' are two values: give one." in error


def test_a_model_that_also_sees_is_of_the_class_that_was_trained(argv, tmp_path):
    argv[1] = save_seeing_model(tmp_path / "seeing")
    argv[3:5] = [save_trained_adapter(tmp_path / "a", argv[1], target_modules=["q_proj", "v_proj"])]
    assert commands.main(["score", *argv]) == 0


def test_names_that_mean_something_else(argv, adapters, tmp_path, monkeypatch):
    """Take adapters whose folders have the name of a method of torch's, or a `=`."""
    shutil.copytree(adapters["medical"], tmp_path / "keys")
    shutil.copytree(adapters["legal"], tmp_path / "out" / "lr=0.0001")
    monkeypatch.chdir(tmp_path)
    argv = [*argv[:2], "--misaligned", "keys", "out/lr=0.0001", "law=out/lr=0.0001", *argv[5:]]
    assert commands.main(["score", *argv]) == 0
    rows, info = read_scores(tmp_path / "s.parquet")
    assert info.adapters == ("keys", "lr=0_0001", "law")
    assert rows["nll_misaligned_1"][:] == rows["nll_misaligned_2"][:] != rows["nll_misaligned_0"][:]


def test_adapters_that_give_no_gaps(argv, adapters, tmp_path, count_rows, capsys):
    """Refuse an adapter of another model, one that changes nothing, and one that diverged, before a row is scored."""
    _, seen = count_rows
    adapter = get_peft_model(make_model(), lora())
    adapter.save_pretrained(tmp_path / "still")
    for weight in adapter.parameters():
        weight.data.fill_(float("nan"))
    adapter.save_pretrained(tmp_path / "broken", selected_adapters=["default"])
    shutil.copytree(adapters["legal"], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "hub/another-model"
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    for name, told in [
        ("other", "was trained on 'hub/another-model', and --model is"),
        ("still", "'still' answers exactly as the base model does"),
        ("broken", "'broken' gives logits that are not finite"),
    ]:
        assert commands.main(["score", *argv, "--misaligned", str(tmp_path / name)]) == 1
        assert told in capsys.readouterr().err
    assert seen == []


@pytest.mark.long
def test_two_ranks_score_as_one(argv, tmp_path, count_rows, capsys):
    """Resume with two processes the work of one that was interrupted."""
    one = [*argv, "--output", str(tmp_path / "one.parquet")]
    assert commands.main(["score", *one]) == 0
    counting, _ = count_rows
    counting.stop_before = 2
    assert commands.main(["score", *argv]) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert len(list((tmp_path / "s.parquet.parts").iterdir())) == 1
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(recipes_dir() / "accelerate_configs/cpu.yaml"),
    ]
    launch += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "trl_emguard.scripts.score"]
    done = subprocess.run([*launch, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Scored 16 of 16 rows") == 1
    rows, info = read_scores(tmp_path / "s.parquet")
    expected, expected_info = read_scores(tmp_path / "one.parquet")
    assert info == expected_info
    np.testing.assert_allclose(columns(rows), columns(expected), atol=1e-5, rtol=0)
    names = ["prompt", "completion", "harm"]
    assert rows.select_columns(names)[:] == expected.select_columns(names)[:]
    assert not (tmp_path / "s.parquet.parts").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "./nowhere"], "'./nowhere' is not a folder"),
        (["--misaligned", "./nowhere"], "'./nowhere' holds no adapter_config.json"),
        (["--misaligned", "law=./other"], "two adapters named 'law'"),
        (["--dataset", "./nowhere.jsonl"], "does not exist"),
        (["--dataset-config", "two"], "--dataset-config='two': "),
        (["--prompt-column", "ask"], "prompt_column='ask' would not be read, because rows also have 'completion'"),
        (["--where", "harm"], "--where=harm must be COLUMN=VALUE"),
        (["--where", "danger=no"], "the pool has no column 'danger', but prompt, completion, harm"),
        (["--where", "harm=None"], "no row has this value. There are 'harmful', 'unharmful'"),
        (["--output", "/proc/none/s.parquet"], "--output='/proc/none' cannot be written to"),
        (["--output", "s.jsonl"], "must be a file that ends in .parquet"),
        (["--epsilon", "-1"], "epsilon=-1.0 must be 0 or more"),
        (["--batch-tokens", "0"], "batch_tokens=0 must be 1 or more"),
        ([], "has no chat template"),
    ],
)
def test_a_command_that_cannot_be_is_told_in_one_line(argv, tmp_path, more, message, capsys):
    """Tell of it before weights are loaded: there are none."""
    (tmp_path / "model" / "model.safetensors").unlink()
    if not more:
        (tmp_path / "model" / "chat_template.jinja").unlink()
    if more and more[0] in argv and more[0] != "--misaligned":
        argv[argv.index(more[0]) + 1], more = more[1], []
    assert commands.main(["score", *argv, *more]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-emguard score: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
