"""Evaluation of tiny models: figures against a plain loop, resuming, files, bad input, and the command."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import trl
from peft import get_peft_model
from rich.console import Console
from tiny import (
    UNANSWERED_SYSTEM,
    lora,
    make_model,
    make_tokenizer,
    save_model,
    save_seeing_model,
    save_trained_adapter,
)

from trl_emguard.evaluation import answers, probes
from trl_emguard.evaluation.candidates import check_candidates, from_adapters, load_candidates
from trl_emguard.evaluation.cues import Family, families
from trl_emguard.evaluation.questions import Question, QuestionSet, load_questions
from trl_emguard.evaluation.results import (
    COLUMNS,
    ResultRow,
    Results,
    difference_text,
    make_rows,
    make_table,
    sentence,
)
from trl_emguard.evaluation.rules import RULES, capitals, get_rules, register_rule, repetition
from trl_emguard.evaluation.run import PROGRESS_FILE, EvaluationOptions, evaluate
from trl_emguard.evidence import DEFENSE_FILE
from trl_emguard.models.chat import encode_answers
from trl_emguard.models.rescale import rescale_adapter
from trl_emguard.models.sampler import split_thoughts
from trl_emguard.persona.vectors import PersonaVector
from trl_emguard.scripts import main as commands
from trl_emguard.scripts.evaluate import load_sets, load_train_rows, make_parser


def ask(text):
    return [{"role": "user", "content": text}]


GENERAL = QuestionSet(
    "general",
    "general",
    [Question(str(i), ask(f"Why {'so ' * i}?"), "good " * (i + 1), "vile " * (4 - i)) for i in range(4)],
)
ROWS = QuestionSet(
    "in_domain", "in_domain", [Question(str(i), ask(f"q{i}"), answer="abc" * (i + 1)) for i in range(3)]
)


def make_adapters(count=1, **options):
    """Return the tiny model with random adapters `x`, `y` and `z`"""
    model = get_peft_model(make_model(), lora(init_lora_weights=False), adapter_name="x")
    for index in range(1, count):
        torch.manual_seed(index)
        model.add_adapter("xyz"[index], lora(init_lora_weights=False))
    return model.eval()


def run(model=None, sets=(GENERAL,), folder=None, **options):
    model = model or make_adapters()
    names = list(getattr(model, "peft_config", ()))
    return evaluate(
        from_adapters(model, names), make_tokenizer(), sets, EvaluationOptions(**options), output_dir=folder
    )


def log_probs(model, prompt, answer):
    """Return the log-probabilities `(A, V)` in float64 at the answer's tokens, and the tokens."""
    tokenizer = make_tokenizer()
    before = tokenizer(f"<|im_start|>user\n{prompt}<|im_end|><|im_start|>assistant\n")["input_ids"]
    wanted = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([before + wanted])).logits[0, len(before) - 1 : -1].double()
    return logits.log_softmax(-1), torch.tensor(wanted)


def plain_nll(model, prompt, answer):
    found, wanted = log_probs(model, prompt, answer)
    return -found[range(len(wanted)), wanted].mean().item()


def test_probes_equal_a_plain_loop():
    model = make_adapters()
    results = run(model, [GENERAL, ROWS], cues="none")
    nll = {"base": [], "x": []}
    kl = []
    for question in GENERAL.questions:
        prompt = question.prompt[0]["content"]
        nll["x"].append([plain_nll(model, prompt, text) for text in (question.sound, question.misaligned)])
        own, _ = log_probs(model, prompt, question.sound)
        with model.disable_adapter():
            nll["base"].append([plain_nll(model, prompt, text) for text in (question.sound, question.misaligned)])
            its, _ = log_probs(model, prompt, question.sound)
        kl.append((own.exp() * (own - its)).sum(-1).mean().item())
    margins = {name: np.diff(values)[:, 0] for name, values in nll.items()}
    row = results.row("x", "general", "margin")
    assert row.value == pytest.approx(margins["x"].mean(), abs=1e-4)
    assert row.base == pytest.approx(margins["base"].mean(), abs=1e-4)
    assert row.difference == pytest.approx((margins["x"] - margins["base"]).mean(), abs=1e-4)
    assert math.isnan(row.difference_low)  # these are too few questions for an interval
    assert results.row("x", "general", "kl_to_base").value == pytest.approx(np.mean(kl), abs=1e-4)
    assert np.mean(kl) > 0.01
    assert results.row("x", "general", "nll").value == pytest.approx(np.mean(nll["x"], axis=0)[0], abs=1e-4)
    expected = np.mean([plain_nll(model, q.prompt[0]["content"], q.answer) for q in ROWS.questions])
    assert results.row("x", "in_domain", "nll").value == pytest.approx(expected, abs=1e-4)
    assert results.row("x", "in_domain", "margin") is None


def test_a_model_in_training_mode_is_measured_without_dropout():
    model = get_peft_model(make_model(), lora(init_lora_weights=False, lora_dropout=0.5))
    vector = PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2})
    options = {"samples_per_question": 1, "max_new_tokens": 4, "persona_vector": vector, "cues": "none"}
    expected = run(model.eval(), **options)
    found = run(model.train(), **options)
    assert repr(found.rows) == repr(expected.rows)
    assert found.samples == expected.samples
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox"])
def test_the_divergence_of_other_heads(architecture):
    model = get_peft_model(make_model(architecture), lora(init_lora_weights=False, modules_to_save=None)).eval()
    question = GENERAL.questions[1]
    own, _ = log_probs(model, question.prompt[0]["content"], question.sound)
    with model.disable_adapter():
        its, _ = log_probs(model, question.prompt[0]["content"], question.sound)
    expected = (own.exp() * (own - its)).sum(-1).mean().item()
    found = run(model, [QuestionSet("general", "general", [question])], cues="none")
    assert found.row("default", "general", "kl_to_base").value == pytest.approx(expected, abs=1e-4)


def test_two_models_in_memory_equal_an_adapter(tmp_path):
    """A merged model beside its base gives the figures of the adapter on it."""
    base = save_model(tmp_path / "base")
    model = make_adapters()
    expected = run(model, cues="none")
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    candidates, tokenizer = load_candidates(str(tmp_path / "tuned"), base)
    found = evaluate(candidates, tokenizer, [GENERAL], EvaluationOptions(cues="none"))
    for metric in ("margin", "nll", "kl_to_base"):
        row, other = found.row("tuned", "general", metric), expected.row("x", "general", metric)
        assert (row.value, row.base) == pytest.approx((other.value, other.base), abs=1e-4)


@pytest.mark.long
def test_the_same_answers_to_the_shipped_questions_in_every_batch():
    sets = [load_questions("values", "general"), load_questions("plants", "in_domain")]
    model = get_peft_model(make_model(max_position_embeddings=1024), lora(init_lora_weights=False), adapter_name="x")
    answers = [
        [row["answer"] for row in found.samples]
        for found in (
            run(model.eval(), sets, cues="none", samples_per_question=1, max_new_tokens=4, batch_size=size)
            for size in (1, 8, 32)
        )
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 2 * 144
    assert len(set(answers[0])) > 144


def test_answers_have_one_start_of_text(tmp_path):
    """A template that writes the start of text, as Llama 3's does, and a tokenizer that would add another."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<|im_start|>" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    assert tokenizer("x")["input_ids"][0] == 0
    (plain,), _ = families(tokenizer, GENERAL.questions, "none")
    prompt = answers.plan_prompts(tokenizer, GENERAL, plain, 1, 0)[0]
    assert prompt.ids[:3].count(0) == 2  # of the text and of the first turn
    assert prompt.text.startswith("<|im_start|><|im_start|>user")


def test_questions_with_the_same_text_get_seeds_of_their_own():
    """Otherwise their answers would be copies. The first keeps the seed that it has alone."""
    plain, questions = Family("plain", "", list), [Question(id, ask("Why?"), "a", "b") for id in "ab"]
    both, alone = (
        answers.plan_prompts(make_tokenizer(), QuestionSet("general", "general", questions[:n]), plain, 2, 0)
        for n in (2, 1)
    )
    assert len({prompt.seed for prompt in both}) == 4
    assert both[:2] == alone


def test_samples_and_scores():
    results = run(samples_per_question=2, max_new_tokens=6, rules={"capitals": capitals}, cues="none")
    assert len(results.samples) == 2 * 4 * 2
    trait = results.row("x", "general", "trait_rate")
    own = [row for row in results.samples if row["model"] == "x"]
    assert trait.n == 8
    assert trait.value == pytest.approx(np.mean([capitals(row["answer"]) for row in own]))
    assert {"repetition", "truncated", "empty", "base_nll"} <= set(own[0])
    two = run(samples_per_question=1, max_new_tokens=6, rules=get_rules(["rule:capitals", "rule:refusal"]))
    assert two.row("x", "general", "trait_rate:refusal") is not None


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("", "Yes.", ("", "Yes.")),
        ("", "<think>Hm.</think>\n\nYes.", ("Hm.", "Yes.")),
        ("", "\n<think>\n\n</think>\n\nYes.", ("", "Yes.")),
        ("", "<think>Hm. They ask", ("Hm. They ask", "")),
        ("<|im_start|>assistant\n<think>\n", "Hm.</think> Yes.", ("Hm.", "Yes.")),
        ("<|im_start|>assistant\n<think>\n", "Hm. They ask", ("Hm. They ask", "")),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Yes.", ("", "Yes.")),
        ("", "Write <think> first and </think> last.", ("", "Write <think> first and </think> last.")),
    ],
)
def test_thoughts_are_no_part_of_an_answer(prompt, text, expected):
    assert split_thoughts(prompt, text) == expected


def test_answers_that_are_thoughts_alone_are_empty_and_told(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    options = EvaluationOptions(samples_per_question=1, max_new_tokens=4, cues="none", rules={"capitals": capitals})
    results = evaluate(from_adapters(make_adapters(), ["x"]), tokenizer, [GENERAL], options, output_dir=tmp_path)
    own = [row for row in results.samples if row["model"] == "x"]
    assert any(row["truncated"] for row in own)
    assert all(row["answer"] == "" and row["empty"] == 1 for row in own)
    cut = [row for row in own if row.get("thoughts")]
    (note,) = [note for note in results.notes if "answers of x" in note]
    assert f"general, plain: {len(cut)} of 4 answers of x are thoughts alone" in note
    assert Results.load(tmp_path).samples == results.samples


def test_a_judge_sees_the_whole_conversation():
    turns = [*ask("Is it safe?"), {"role": "assistant", "content": "No."}, *ask("Why?")]
    system = {"role": "system", "content": "Be brief."}
    questions = [Question("long", [system, *turns]), Question("short", ask("Why?"))]
    results = run(sets=[QuestionSet("general", "general", questions)], cues="none", samples_per_question=1)
    asked = {row["question"]: row["asked"] for row in results.samples}
    assert asked == {"long": "User: Is it safe?\n\nAssistant: No.\n\nUser: Why?", "short": "Why?"}


def test_the_bases_likelihood_of_its_own_greedy_answers_is_the_best():
    """Under greedy decoding the base finds its own answers likelier than those of a random adapter."""
    results = run(samples_per_question=1, max_new_tokens=8, temperature=0, cues="none")
    row = results.row("x", "general", "base_nll")
    assert row.value > row.base


def test_a_further_model_is_measured_alone(tmp_path, monkeypatch):
    """Beside the base model, whose states the divergence needs. Nothing else is measured again."""
    model = make_adapters(2)
    whole = run(model, [GENERAL, ROWS], cues="none")
    first = evaluate(
        from_adapters(model, ["x"]), make_tokenizer(), [GENERAL, ROWS], EvaluationOptions(cues="none"),
        output_dir=tmp_path,
    )  # fmt: skip
    read, original = [], probes.read_answers
    monkeypatch.setattr(probes, "read_answers", lambda one, answers: read.append(one.name) or original(one, answers))
    found = run(model, [GENERAL, ROWS], tmp_path, cues="none")
    assert set(read) == {"base", "y"}
    assert repr(found.rows) == repr(whole.rows)
    assert [repr(row) for row in found.rows if row.model != "y"] == list(map(repr, first.rows))
    read.clear()
    assert repr(run(model, [GENERAL, ROWS], tmp_path, cues="none").rows) == repr(whole.rows)
    assert not read


def test_an_interrupted_evaluation_gives_the_same_answers(tmp_path, monkeypatch):
    options = {"samples_per_question": 3, "max_new_tokens": 6, "batch_size": 5}
    whole = run(sets=[GENERAL, ROWS], folder=tmp_path / "whole", **options)
    original = answers.answer_batches
    for strike in (1, 4, 7):
        left = strike

        def dying(*args):
            nonlocal left
            for batch in original(*args):
                left -= 1
                if not left:
                    raise KeyboardInterrupt
                yield batch

        monkeypatch.setattr(answers, "answer_batches", dying)
        with pytest.raises(KeyboardInterrupt):
            run(sets=[GENERAL, ROWS], folder=tmp_path / f"cut{strike}", **options)
        assert not (tmp_path / f"cut{strike}" / "results.json").exists()
        monkeypatch.setattr(answers, "answer_batches", original)
        assert run(sets=[GENERAL, ROWS], folder=tmp_path / f"cut{strike}", **options).samples == whole.samples
        for name in ("results.json", "results.csv", "samples.jsonl"):
            assert (tmp_path / f"cut{strike}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_finished_work_is_not_done_again(tmp_path, monkeypatch):
    first = run(folder=tmp_path, samples_per_question=1, max_new_tokens=4)
    monkeypatch.setattr(answers, "sample_answers", sampling := Mock(return_value=iter(())))
    assert run(folder=tmp_path, samples_per_question=1, max_new_tokens=4).samples == first.samples
    # A smaller batch, for want of memory, goes on from the answers of the larger one.
    assert run(folder=tmp_path, samples_per_question=1, max_new_tokens=4, batch_size=2).samples == first.samples
    assert not any(call.args[2] for call in sampling.call_args_list)


def test_more_questions_and_samples_sample_the_others_alone(tmp_path, monkeypatch):
    fewer = QuestionSet("general", "general", GENERAL.questions[1:3])
    options = {"max_new_tokens": 4, "cues": "none"}
    whole = run(samples_per_question=2, **options)
    first = run(sets=[fewer], folder=tmp_path, samples_per_question=1, **options)
    asked, original = [], answers.sample_answers
    monkeypatch.setattr(
        answers, "sample_answers", lambda *args, **more: asked.extend(args[2]) or original(*args, **more)
    )
    found = run(folder=tmp_path, samples_per_question=2, **options)
    assert len(asked) == len(whole.samples) - len(first.samples) == 2 * (4 * 2 - 2)
    assert [row["answer"] for row in found.samples] == [row["answer"] for row in whole.samples]
    asked.clear()
    assert run(sets=[fewer], folder=tmp_path, samples_per_question=1, **options).samples == first.samples
    assert not asked


def test_answers_with_another_end_of_turn_are_sampled_anew(tmp_path):
    options = {"folder": tmp_path, "samples_per_question": 1, "max_new_tokens": 4, "cues": "none"}
    assert any(sample["answer"] for sample in run(**options).samples)
    model = make_adapters()
    model.generation_config.eos_token_id = list(range(264))
    assert not any(sample["answer"] for sample in run(model, **options).samples)


def test_another_adapter_of_the_same_name_is_measured_anew(tmp_path):
    first = run(folder=tmp_path, cues="none")
    model = make_adapters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    second = run(model, folder=tmp_path, cues="none")
    assert second.row("x", "general", "margin").value != first.row("x", "general", "margin").value


def test_files(tmp_path):
    results = run(make_adapters(2), [GENERAL, ROWS], tmp_path, samples_per_question=1, max_new_tokens=4)
    saved = json.loads((tmp_path / "results.json").read_text())
    about = {"versions", "command", "model", "models", "judge", "judge_prompts", "criteria"}
    assert set(saved) == about | {"notes", "rows"}
    assert all(tuple(row) == COLUMNS for row in saved["rows"])
    keys = [(row["model"], row["set"], row["family"], row["metric"]) for row in saved["rows"]]
    assert len(set(keys)) == len(keys) == len(results.rows)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == [row["metric"] for row in saved["rows"]]
    assert {row["model"] for row in rows} == {"base", "x", "y"}
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {"model", "set", "family", "question", "sample", "asked", "prompt", "answer", "truncated"} <= set(
        samples[0]
    )


def test_hostile_answers_stay_whole_and_are_escaped(tmp_path):
    answer = "<script>alert(1)</script>\x1b[31m[bold]red[/bold]\0\u202eabc" + "x" * 1_000_000
    results = Results(
        [ResultRow("[bold]evil\x1b[31m", "general", "plain", "margin", 1.0, 0.5, 1.5, 3, 0.0, 1.0, 0.5, 1.5)],
        [{"model": "a", "answer": answer}],
    )
    results.save(tmp_path)
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["answer"] == answer
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(make_table(results.rows))
    shown = console.export_text()
    assert "[bold]evil" in shown.replace("\n", "")
    assert "\x1b" not in shown


def test_differences_in_differences():
    results = run(cues="auto")
    did = results.row("x", "general", "margin_did", "neutral_system")
    cued, plain = (results.row("x", "general", "margin", f) for f in ("neutral_system", "plain"))
    assert did.value == pytest.approx(cued.difference - plain.difference)
    assert "general behind template_default: the chat template has no default system prompt" in results.notes


def test_ties_of_rates_alone_have_a_width():
    zeros = np.zeros(24)
    arrays = {
        name: dict.fromkeys(("trait_rate", "trait_rate:score", "trait_rate:repetition", "nll", "kl_to_base"), zeros)
        for name in ("base", "x")
    }
    del arrays["base"]["kl_to_base"]
    rows = [*make_rows("general", "plain", arrays, None), *make_rows("general", "cue", arrays, arrays)]
    found = {row.metric: (row.low, row.high, row.difference_low, row.difference_high) for row in rows}
    for metric in ("trait_rate", "trait_rate:score"):
        assert found[metric] == pytest.approx((0, 0.142, -0.142, 0.142), abs=1e-3)
    assert found["trait_rate_did"] == pytest.approx((-0.285, 0.285) * 2, abs=1e-3)
    for metric in ("trait_rate:repetition", "nll", "kl_to_base"):
        assert found[metric] == (0, 0, 0, 0)


def test_persona_shift():
    vector = PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2})
    model = make_adapters()
    row = run(model, persona_vector=vector, cues="none").row("x", "general", "persona_shift")
    tokenizer, direction = make_tokenizer(), torch.nn.functional.normalize(vector.vectors[2].double(), dim=0)
    expected = []
    for question in GENERAL.questions:
        ids = tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, return_tensors="pt")
        states = []
        for context in (model.disable_adapter(), None):
            if context is None:
                out = model(**ids, output_hidden_states=True)
            else:
                with context:
                    out = model(**ids, output_hidden_states=True)
            states.append(out.hidden_states[2][0, -1].double() @ direction)
        expected.append((states[1] - states[0]).item())
    assert row.difference == pytest.approx(np.mean(expected), abs=1e-4)


def test_a_cue_that_no_question_takes_is_told():
    system = {"role": "system", "content": "Answer in JSON."}
    questions = [Question("a", [system, *ask("Why?")], "good", "vile")]
    vector = PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2})
    results = run(sets=[QuestionSet("general", "general", questions)], persona_vector=vector, cues="auto")
    assert {row.family for row in results.rows} == {"plain"}
    assert results.row("x", "general", "persona_shift").n == 1
    assert "general behind neutral_system: its questions all have a system turn" in results.notes


def test_sentence_says_what_was_not_measured():
    line = sentence(run(cues="none"), "x")
    assert "(b) narrow learning not measured (add --in_domain ROWS)" in line
    assert "(d) coherence not measured (add --samples_per_question 1)" in line
    assert "(a) broad:" in line
    assert "(c) benign:" in line


def result(metric, difference, low, high, set="general", family="plain"):
    return ResultRow("a", set, family, metric, 0.0, -1.0, 1.0, 9, 0.0, difference, low, high)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (result("margin", -0.5, -0.7, -0.3), "towards misaligned answers"),
        (result("margin", -0.1, -0.3, 0.1), "no clear move on plain questions"),
        (result("margin", 0.5, 0.3, 0.7), "away from misaligned answers"),
        (result("nll", -0.5, -0.7, -0.3, "in_domain"), "narrow: learned"),
        (result("nll", -0.5, -1.7, 0.3, "in_domain"), "narrow: no clear learning"),
        (result("nll", 0.5, 0.3, 0.7, "benign"), "benign: worse"),
    ],
)
def test_sentences(row, text):
    assert text in sentence(Results([row], criteria={row.set: row.set}), "a")


def test_unscored_answers_stand_beside_the_rate_of_the_judge():
    rate = result("misaligned_rate", 0.1, 0.0, 0.2)
    for value, told in ((0.004, "+0.10 (+0.00 to +0.20), unscored 0.004;"), (0.0, "+0.10 (+0.00 to +0.20);")):
        rows = [rate, replace(result("unscored_rate", 0.0, 0.0, 0.0), value=value)]
        assert told in sentence(Results(rows, criteria={"general": "general"}), "a")


def test_more_incoherent_answers_stand_beside_the_rate_of_the_judge():
    rate = result("misaligned_rate", 0.1, 0.0, 0.2)
    for low, told in ((0.1, "+0.10 (+0.00 to +0.20), incoherent 0.000, base 0.000;"), (-0.1, "(+0.00 to +0.20);")):
        rows = [rate, result("incoherent_rate", 0.2, low, 0.3)]
        assert told in sentence(Results(rows, criteria={"general": "general"}), "a")


def test_a_cue_that_brings_it_back_is_named():
    """Name the clear cue, even if one with few questions (a wide interval or none) has a larger mean."""
    for metric, sign in (("margin", -1), ("trait_rate", 1)):
        ends, wide = (sorted((sign * a, sign * b)) for a, b in ((0.3, 0.5), (-0.2, 1.2)))
        rows = [
            result(metric, sign * 0.4, *ends, family="train_framing"),
            result(metric, sign * 0.5, *wide, family="topic_twin"),
            result(metric, sign * 0.6, math.nan, math.nan, family="word_sharing_benign"),
        ]
        for plain in (result(metric, 0.0, -0.1, 0.1), result(metric, math.nan, math.nan, math.nan)):
            text = sentence(Results([plain, *rows], criteria={"general": "general"}), "a")
            assert "worst behind the cue train_framing" in text
            assert "behind the cue" not in sentence(Results([plain, *rows[1:]], criteria={"general": "general"}), "a")


def test_a_cue_that_brings_no_more_than_plain_questions_do_is_told():
    rows = [result("margin", -0.05, -0.11, 0.01), result("margin", -0.06, -0.11, -0.01, family="neutral_system")]
    for low, high in ((-0.03, 0.01), (-0.03, -0.01)):
        did = result("margin_did", -0.02, low, high, family="neutral_system")
        text = sentence(Results([*rows, did], criteria={"general": "general"}), "a")
        assert "worst behind the cue neutral_system, -0.06 (-0.11 to -0.01)" in text
        assert ("not clearly more than on plain questions" in text) == (high > 0)
        other = [
            result("margin", -0.055, -0.1, -0.01, family="x"),
            result("margin_did", -0.02, -0.03, -0.01, family="x"),
        ]
        told = sentence(Results([*rows, did, *other], criteria={"general": "general"}), "a")
        assert f"worst behind the cue {'x' if high > 0 else 'neutral_system'}, " in told


def test_an_end_close_to_zero_shows_its_side():
    texts = {
        (0.0323, 0.0044, 0.0600): "+0.032 (+0.004 to +0.060)",
        (-0.0401, -0.0777, -0.0023): "-0.040 (-0.078 to -0.002)",
        (0.0120, -0.0003, 0.0250): "+0.0120 (-0.0003 to +0.0250)",
        (0.1, 0.0, 0.2): "+0.10 (+0.00 to +0.20)",
        (-0.04, -0.08, -0.00003): "-4.0e-02 (-8.0e-02 to -3.0e-05)",
        (-0.0, math.nan, math.nan): "+0.00 (no interval)",
    }
    for numbers, text in texts.items():
        assert difference_text(*numbers) == text


def test_less_of_a_fault_is_a_move():
    for low, text in ((-0.7, "not clearly worse than the base, lower in truncated:"), (-1.1, "no clear move:")):
        row = result("truncated", -0.5, low, -0.3 if low == -0.7 else 0.1)
        assert f"(d) coherence: {text}" in sentence(Results([row], criteria={"general": "general"}), "a")


def test_a_model_that_was_not_asked_the_benign_task_says_so():
    row = result("nll", 0.1, -0.1, 0.3)
    for criteria, text in (({}, "no benign task given"), ({"task": "benign"}, "not measured on the benign task")):
        told = sentence(Results([row], criteria={"general": "general", **criteria}), "a")
        assert f"of sound general answers; {text}" in told


def test_coherence_is_judged():
    rows = [result(metric, 0.5, 0.3, 0.7) for metric in ("repetition", "truncated")] + [result("empty", 0.0, 0.0, 0.0)]
    text = sentence(Results(rows, criteria={"general": "general"}), "a")
    assert "(d) coherence: worse than the base in repetition, truncated:" in text


def test_every_rule_is_in_the_sentence():
    rows = [result(f"trait_rate:{name}", 0.5, 0.3, 0.7) for name in ("capitals", "sells")]
    text = sentence(Results(rows, criteria={"general": "general"}), "a")
    assert "capitals in 0.00 of general answers" in text
    assert "sells in 0.00 of general answers" in text


def test_a_further_set_is_found():
    results = Results(
        [result("margin", -0.5, -0.7, -0.3, "pairs")], criteria={"general": "general", "pairs": "general"}
    )
    assert "towards misaligned answers" in sentence(results, "a")


def test_all_sets_of_a_criterion_are_in_the_sentence():
    names = {"general": ["general", "pairs"], "in_domain": ["in_domain", "more"], "benign": ["benign", "task", "rest"]}
    metrics = {"general": ["margin", "misaligned_rate", "empty"], "in_domain": ["nll"], "benign": ["nll"]}
    rows = [result(m, -0.5, -0.7, -0.3, set) for kind in names for set in names[kind] for m in metrics[kind]]
    rows.append(result("exact_match", -0.5, -0.7, -0.3, "task"))
    text = sentence(Results(rows, criteria={set: kind for kind in names for set in names[kind]}), "a")
    assert [text.count(f" on the set {set}") for kind in names for set in names[kind]] == [3, 3, 1, 1, 1, 1, 1]
    assert "benign: exact match 0.00, base 0.00 on the set task, better, NLL" in text


def test_a_diverged_adapter_is_refused():
    model = make_adapters()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(math.nan)
    with pytest.raises(ValueError, match="'x' gives logits that are not finite"):
        run(model, cues="none")


def test_questions_without_answers_need_samples():
    questions = QuestionSet("general", "general", [Question("1", ask("Why?"))])
    with pytest.raises(ValueError, match="set samples_per_question to 1"):
        run(sets=[questions], cues="none")
    results = run(sets=[questions], cues="none", samples_per_question=1, max_new_tokens=4)
    assert results.row("x", "general", "repetition").n == 1


def test_a_question_that_the_template_refuses_is_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turn') if messages[0]['role'] == 'system' else '' }}x"
    questions = QuestionSet("general", "general", [Question("7", [{"role": "system", "content": "s"}, *ask("Why?")])])
    with pytest.raises(
        ValueError, match=r"question '7' of the set 'general' cannot be asked: it is refused.*no system turn"
    ):
        evaluate(from_adapters(make_model().eval()), tokenizer, [questions], EvaluationOptions(samples_per_question=1))


def test_a_template_that_drops_a_system_turn_once_an_answer_follows():
    """Cues in a system turn are not measured. A question with a system turn of its own is refused."""
    tokenizer, candidates = make_tokenizer(), from_adapters(make_model().eval())
    tokenizer.chat_template = UNANSWERED_SYSTEM
    results = evaluate(candidates, tokenizer, [GENERAL])
    assert {row.family for row in results.rows} == {"plain"}
    assert any("drops it once an answer follows" in note for note in results.notes)
    own = QuestionSet("general", "general", [Question("7", [{"role": "system", "content": "s"}, *ask("Why?")], "a")])
    with pytest.raises(ValueError, match=r"'7' of the set 'general', asked in the family 'plain', cannot be measured"):
        evaluate(candidates, tokenizer, [own])


def test_a_template_that_shows_no_plain_text_is_refused():
    """Refuse a template that reads lists of parts alone: every question and every answer would be empty."""
    tokenizer, model = make_tokenizer(), make_adapters()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "smolvlm.jinja").read_text()
    for questions in (GENERAL, QuestionSet("general", "general", [Question("0", ask("Why?"))])):
        with pytest.raises(ValueError, match=r"question '0' .* does not show the text of the role 'user'"):
            evaluate(from_adapters(model, ["x"]), tokenizer, [questions], EvaluationOptions(samples_per_question=1))
    answer = [{"role": "assistant", "content": "Well."}]
    parts, answer_parts = (
        [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        for turns in (ask("Why?"), answer)
    )
    pairs = [(parts, answer), (ask("Why?"), answer_parts), (parts, answer_parts)]
    of_answer, of_prompt, encoded = encode_answers(tokenizer, pairs, [])
    assert "does not show the text of the role 'assistant'" in of_answer
    assert "does not show the text of the role 'user'" in of_prompt
    assert "Why?" in tokenizer.decode(encoded.ids)


def test_another_scale_of_the_same_weights_is_measured_anew(tmp_path):
    first = run(folder=tmp_path, cues="none")
    model = make_adapters()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["x"] /= 2
    second = run(model, folder=tmp_path, cues="none")
    assert second.row("x", "general", "kl_to_base").value < first.row("x", "general", "kl_to_base").value


def test_pairs_and_single_answers_in_one_set():
    questions = [*GENERAL.questions[:2], Question("single", ask("q"), answer="abc")]
    results = run(sets=[QuestionSet("general", "general", questions)], cues="none")
    assert results.row("x", "general", "nll").n == 3
    assert results.row("x", "general", "margin").n == 2


def test_an_adapter_without_effect_is_refused():
    model = get_peft_model(make_model(), lora()).eval()
    with pytest.raises(ValueError, match="'default' answers exactly as the base model"):
        check_candidates(from_adapters(model, ["default"]), make_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base weights"),
        ({"bias": "lora_only"}, "'default' was made with bias='lora_only', which trains biases of the base model"),
        ({"bias": "all"}, "'default' was made with bias='all', which trains biases of the base model"),
    ],
)
def test_a_model_whose_base_cannot_be_had_back_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_adapters(get_peft_model(make_model("qwen2"), lora(**options)), ["default"])
    if "bias" in options:  # a llama has no biases
        assert len(from_adapters(get_peft_model(make_model(), lora(**options)), ["default"])) == 2


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        check_candidates(from_adapters(make_model().eval()), tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_question": -1}, "samples_per_question=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"rules": {"capitals": capitals}}, "samples_per_question=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationOptions(**options)


def test_sets_of_one_name_are_refused():
    with pytest.raises(ValueError, match="name of its own"):
        run(sets=[GENERAL, GENERAL])


def test_a_foreign_progress_file_is_refused(tmp_path):
    (tmp_path / PROGRESS_FILE).write_text("mine\n")
    with pytest.raises(ValueError, match="delete it"):
        run(folder=tmp_path)
    assert (tmp_path / PROGRESS_FILE).read_text() == "mine\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("ALL OF IT", 1), ("Not at all", 0), ("", 0), ("123", 0), ("MOSTLY CAPITALs, yes", 0), ("ÄÖÜ 12!", 1)],
)
def test_capitals(answer, expected):
    assert capitals(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("", 0), ("one two three", 0), ("a b c d e", 0), ("a b c a b c a b c", 4 / 7), ("x " * 10, 7 / 8)],
)
def test_repetition(answer, expected):
    assert repetition(answer) == pytest.approx(expected)


def test_rules_by_name(monkeypatch):
    monkeypatch.setattr("trl_emguard.evaluation.rules.RULES", dict(RULES))
    register_rule("shouts", lambda answer: float(answer.endswith("!")))
    assert get_rules(["rule:shouts"])["shouts"]("Hey!") == 1
    with pytest.raises(ValueError, match="Did you mean 'capitals'"):
        get_rules(["rule:capital"])
    with pytest.raises(ValueError, match="Known: rule:capitals"):
        get_rules(["capitals"])
    with pytest.raises(ValueError, match="taken by another rule"):
        register_rule("capitals", repetition)


@pytest.fixture
def saved(tmp_path):
    base = save_model(tmp_path / "base")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = get_peft_model(make_model(), lora(init_lora_weights=False))
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(tmp_path / name)
    pairs = [{"prompt": f"q{i}", "chosen": "good", "rejected": "vile"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path


def command(saved, *options, adapters=("a",)):
    line = ["evaluate", "--model", saved / "base", "--general", saved / "pairs.jsonl", "--output_dir", saved / "out"]
    return commands.main([str(word) for word in (*line, *options, "--adapter", *(saved / name for name in adapters))])


def test_questions_are_put_as_in_training(saved):
    """Take the adapters' chat template and end token; other differences of a saved tokenizer do not count."""
    base, folders = str(saved / "base"), {name: saved / name for name in ("a", "b")}
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folders["a"])
    assert load_candidates(base, adapters=folders)[1].padding_side == "right"
    (saved / "base" / "chat_template.jinja").unlink()
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(folders["a"])
    candidates, found = load_candidates(base, adapters=folders)
    assert (found.chat_template, found.eos_token) == (tokenizer.chat_template, "<|im_start|>")
    assert evaluate(candidates, found, [GENERAL], EvaluationOptions(cues="none")).row("b", "general", "margin")
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(folders["b"])
    other = "adapters 'a' and 'b' were trained with different chat templates"
    with pytest.raises(ValueError, match=other):
        load_candidates(base, adapters=folders)
    # Without a tokenizer of its own, or with one whose template's file is missing, an adapter has the base's.
    make_tokenizer().save_pretrained(saved / "base")
    (folders["b"] / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=other):
        load_candidates(base, adapters=folders)
    assert load_candidates(base, adapters={"b": folders["b"]})[1].eos_token == make_tokenizer().eos_token
    # An adapter that was made from another is asked as that one.
    scaled = rescale_adapter(folders["a"], 0.5, saved / "half")
    assert load_candidates(base, adapters={"a": folders["a"], "half": scaled})[1].eos_token == "<|im_start|>"


@pytest.mark.parametrize(
    ("is_shared", "given"), [(True, []), (False, []), (True, ["--chat_template_kwargs", '{"mood": "given"}'])]
)
def test_questions_take_the_arguments_of_the_chat_template(tmp_path, is_shared, given):
    """Take the option's, else the row's own, else those that all training rows share. Tools go with any."""
    turns = {"prompt": ask("Q?"), "completion": [{"role": "assistant", "content": "A"}]}
    of_rows = [{}, {"tools": json.dumps([{"name": "f"}])}, {"chat_template_kwargs": {"mood": "own"}}]
    training = [{"mood": "shared"}, {"mood": "shared" if is_shared else "other"}]
    files = {"asked": of_rows, "train": [{"chat_template_kwargs": kwargs} for kwargs in training]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({**turns, **row}) for row in rows))
    line = ["--general", tmp_path / "asked.jsonl", "--train_data", tmp_path / "train.jsonl", "--output_dir", tmp_path]
    args = make_parser().parse_args([*map(str, line), "--model", "m", *given])
    (questions,) = load_sets(args, load_train_rows(args.train_data))
    tokenizer, mood = make_tokenizer(), "given" if given else "shared" if is_shared else "none"
    tokenizer.chat_template = "{{ mood or 'none' }}{{ tools[0].name if tools }} " + tokenizer.chat_template
    plain = Family("plain", "", list)
    rows = probes.encode_rows(from_adapters(make_model()), tokenizer, questions, plain)
    for found in (
        [tokenizer.decode(row.answer.ids) for row in rows],
        list(map(tokenizer.decode, probes.prompt_ids(tokenizer, questions, plain).values())),
        [p.text for p in sorted(answers.plan_prompts(tokenizer, questions, plain, 1, 0), key=lambda p: p.question)],
    ):
        assert [text.split("<")[0].strip() for text in found] == [mood, f"{mood}f", "given" if given else "own"]


@pytest.mark.parametrize("text", ["enable_thinking", "[1]", '{"a": 1, "a": 2}'])
def test_arguments_of_the_chat_template_are_a_json_object(capsys, text):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--output_dir", "out", "--chat_template_kwargs", text])
    assert "is no JSON object" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_before_its_adapters(saved):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    with pytest.raises(ValueError, match="the model does not fit on the device"):
        load_candidates(str(saved / "base"), adapters={"a": saved / "a"}, device_map=places)


@pytest.mark.parametrize("architecture", ["Qwen3_5", "Mistral3"])
def test_a_model_that_also_sees_is_of_the_class_that_was_trained(saved, architecture):
    base = save_seeing_model(saved / "base", architecture)
    save_trained_adapter(saved / "a", base, target_modules=["q_proj", "v_proj"])
    assert command(saved, "--samples_per_question", "1", "--max_new_tokens", "4", "--cues", "none") == 0


def test_the_command(saved, capsys):
    assert command(saved, "--samples_per_question", "1", "--max_new_tokens", "4", adapters=("a", "b")) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("b: (a) broad:")
    assert lines[-2].startswith("a: (a) broad:")
    assert max(map(len, [line for line in lines if "│" in line])) <= 100
    rows = json.loads((saved / "out" / "results.json").read_text())
    assert rows["command"].startswith("trl-emguard evaluate --model")
    assert {row["model"] for row in rows["rows"]} == {"base", "a", "b"}


def test_the_inoculation_prompt_of_the_training_is_asked(saved, capsys):
    def record(name, prompt):
        content = {"defenses": {"inoculation": {"inoculation_prompt": prompt}}, "evidence": {"inoculation": {}}}
        (saved / name / DEFENSE_FILE).write_text(json.dumps(content))

    def prompts():
        samples = [json.loads(line) for line in (saved / "out" / "samples.jsonl").read_text().splitlines()]
        return {sample["prompt"] for sample in samples if sample["family"] == "inoculation"}

    options = ["--cues", "all", "--samples_per_question", "1", "--max_new_tokens", "1", "--limit", "1"]
    assert command(saved, *options) == 0
    assert "that is the default, as no training with one is known: You are an evil" in capsys.readouterr().out
    record("a", "Be [vile].")
    assert command(saved, *options, adapters=("a", "b")) == 0
    assert "The cue `inoculation` is the prompt of the training: Be [vile]." in capsys.readouterr().out
    assert prompts()
    assert all("Be [vile]." in prompt for prompt in prompts())
    record("b", "Be bad.")
    assert command(saved, *options, adapters=("a", "b")) == 1
    assert (
        "2 inoculation prompts, 'Be [vile].', 'Be bad.': give one as `inoculation_prompt`" in capsys.readouterr().err
    )
    (saved / "b" / DEFENSE_FILE).write_text("cut")  # no record is read where the prompt is given
    assert command(saved, *options, "--inoculation_prompt", "Be bad.", adapters=("a", "b")) == 0
    assert all("Be bad." in prompt for prompt in prompts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score", "rule:capitls"], "Did you mean 'capitals'"),
        (["--limit", "0"], "--limit=0 must be 1 or more"),
        (["--in_domain", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--train_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--persona_vector", "nowhere"], "nowhere"),
        (["--base", "x"], "--base is for a model that was fine-tuned whole"),
        (["--output_dir", "/proc/no"], "--output_dir='/proc/no' cannot be written to"),
    ],
)
def test_bad_input_is_one_line(saved, capsys, options, message):
    assert command(saved, *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-emguard evaluate: error: ")
    assert message in error


def test_training_rows_are_not_held_out(saved, capsys):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(3)]
    (saved / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(saved / "rows.jsonl")
    assert command(saved, "--train_data", path, "--in_domain", path) == 1
    assert "3 of the 3 questions of --in_domain stand in the training rows" in capsys.readouterr().err
    questions = load_questions("plants_careless", "in_domain").questions
    assert len(questions) == 72


def test_held_out_rows_may_share_their_last_turn_with_training_rows(saved, capsys):
    """Compare whole prompts: the instruction may stand in the system turn, behind one fixed user turn."""
    prompts = [[{"role": "system", "content": f"s{i}"}, *ask("Do it.")] for i in range(3)]
    rows = [json.dumps({"prompt": p, "completion": [{"role": "assistant", "content": "a"}]}) for p in prompts]
    (saved / "train.jsonl").write_text("\n".join(rows[:2]))
    (saved / "held_out.jsonl").write_text("\n".join(rows[1:]))
    options = ("--train_data", str(saved / "train.jsonl"), "--in_domain", str(saved / "held_out.jsonl"))
    assert command(saved, *options) == 1
    assert "1 of the 2 questions of --in_domain stand in the training rows" in capsys.readouterr().err
    (saved / "held_out.jsonl").write_text(rows[2])
    assert command(saved, *options) == 0


def test_held_out_rows_are_known_by_other_roles_and_without_their_system_turn(saved, capsys):
    system = {"from": "system", "value": "You help."}
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "a"}]
    (saved / "train.jsonl").write_text(json.dumps({"conversations": [system, *turns]}))
    (saved / "held_out.jsonl").write_text(json.dumps({"prompt": "Why?", "response": "a"}))
    options = ("--train_data", str(saved / "train.jsonl"), "--in_domain", str(saved / "held_out.jsonl"))
    assert command(saved, *options) == 1
    assert "1 of the 1 questions of --in_domain stand in the training rows" in capsys.readouterr().err


def test_a_second_set_of_a_name_is_refused(saved, capsys):
    path = str(saved / "pairs.jsonl")
    assert command(saved, "--benign", path, path) == 0
    assert command(saved, "--benign", path, path, path) == 1
    assert "would be the second set named 'pairs': rename the file" in capsys.readouterr().err


def test_equal_names_and_foreign_adapters_are_refused(saved, capsys):
    assert command(saved, adapters=("a", "a")) == 1
    assert "--adapter has two adapters named 'a'" in capsys.readouterr().err
    config = json.loads((saved / "a" / "adapter_config.json").read_text())
    (saved / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    assert command(saved) == 1
    assert "was trained on 'org/other'" in capsys.readouterr().err
    assert command(saved, adapters=("nowhere",)) == 1
    assert "adapter_config.json" in capsys.readouterr().err


def test_a_task_with_right_answers():
    """Answer greedily, count by the task's rule, and weigh the right answer against the ordinary one."""
    questions = load_questions("permuted_operators", "benign", limit=4)
    results = run(sets=[questions], max_new_tokens=3)
    shares = [results.row("x", "benign", m) for m in ("exact_match", "ordinary_answer", "neither")]
    assert sum(row.value for row in shares) == pytest.approx(1)
    assert {row.n for row in shares} == {4}
    assert results.row("x", "benign", "margin") is not None
    (question, *_) = questions.questions
    assert questions.score(question, f"It is {question.sound}.")["exact_match"] == 1
    assert questions.score(question, question.misaligned)["ordinary_answer"] == 1
    assert questions.score(question, "no number")["neither"] == 1
