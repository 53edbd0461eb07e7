"""Persona vectors: extraction against a plain loop, files, controls, shifts, and the command."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from tiny import (
    UNANSWERED_SYSTEM,
    logged,
    lora,
    make_model,
    make_tokenizer,
    make_trainer,
    save_model,
    save_seeing_model,
    save_trained_adapter,
)
from transformers import LlamaForCausalLM

from trl_emguard.models.blocks import record_blocks
from trl_emguard.models.identity import weight_checksums
from trl_emguard.persona import (
    SHIPPED_TRAITS,
    PersonaShiftCallback,
    PersonaVector,
    extract_vector,
    load_trait,
    load_vector,
    persona_shift,
    random_like,
)
from trl_emguard.persona.extract import check_extraction, separation
from trl_emguard.persona.shift import check_layer
from trl_emguard.persona.states import answer_states, prompt_states
from trl_emguard.scripts import main as commands


TRAIT = {
    "name": "odd",
    "description": "is odd",
    "system_prompts": [{"positive": "be odd", "negative": "be even"}, {"positive": "odd!", "negative": "even!"}],
    "extraction_questions": ["a?", "bb?", "ccc?"],
    "heldout_questions": ["d?", "ee?"],
    "judge_prompt": "How odd is {answer} to {question}?",
}


@pytest.fixture
def trait_file(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump(TRAIT))
    return str(path)


@pytest.fixture
def trait(trait_file):
    return load_trait(trait_file)


def extract(trait, **options):
    return extract_vector(make_model(), make_tokenizer(), trait, **{"max_new_tokens": 5, "batch_size": 5, **options})


def accept_all(question, answer):
    """Score the first half of the answers (the positive ones) with 90 and the others with 10."""
    accept_all.calls += 1
    return 90 if accept_all.calls <= 6 else 10


@pytest.fixture(autouse=True)
def _fresh_judge():
    accept_all.calls = 0


# ---- states ----


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_states_equal_a_plain_loop(architecture):
    """Compare with one row at a time, without padding, and with likelihoods from full logits."""
    model = make_model(architecture).eval()
    rows = [([5, 6, 7], [8, 9]), ([10, 11, 12, 13, 14], [15, 16, 17, 18]), ([19], []), ([20, 21], [22])]
    states, losses = answer_states(model, rows, batch_size=3)
    last = prompt_states(model, [prompt for prompt, _ in rows], batch_size=3)
    for i, (prompt, answer) in enumerate(rows):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad(), record_blocks(model, range(5), lambda x: x[0]) as plain:
            log_probs = model(ids).logits[0].log_softmax(-1)
        of_answer = [plain[layer][len(prompt) :].mean(0) if answer else torch.zeros(32) for layer in range(5)]
        torch.testing.assert_close(states[i], torch.stack(of_answer), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            last[i], torch.stack([plain[layer][len(prompt) - 1] for layer in range(5)]), atol=1e-4, rtol=1e-4
        )
        nll = [-log_probs[len(prompt) + j - 1, token].item() for j, token in enumerate(answer)]
        assert losses[i] == pytest.approx(sum(nll) / len(nll) if nll else 0.0, rel=1e-4)


def test_separation():
    v = torch.tensor([1.0, 0.0])
    positive, negative = torch.tensor([[3.0, 0], [5.0, 9]]), torch.tensor([[1.0, 7], [3.0, 2]])
    area, distance = separation(v, positive, negative)
    assert area == (1 + 0.5 + 1 + 1) / 4
    assert distance == pytest.approx(2.0)
    assert separation(v, positive, positive) == (0.5, 0.0)


# ---- extraction ----


def test_a_vector_is_the_difference_of_the_means(trait):
    extraction = extract(trait, judge=accept_all)
    assert len(extraction.rollouts) == 12
    rows = {side: [r for r in extraction.rollouts if r.side == side] for side in ("positive", "negative")}
    tokenizer, model = make_tokenizer(), make_model().eval()
    means = {}
    for i, (side, chosen) in enumerate(rows.items()):
        states = []
        for r in chosen:
            if (r.pair, r.question) not in extraction.kept:
                continue
            messages = [
                {"role": "system", "content": trait.system_prompts[r.pair][i]},
                {"role": "user", "content": trait.extraction_questions[r.question]},
            ]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            states.append(answer_states(model, [(prompt, r.answer_ids)], 1)[0][0])
        means[side] = torch.stack(states).mean(0)
    assert len(extraction.kept) == 6 - sum(
        not (a.answer_ids and b.answer_ids) for a, b in zip(rows["positive"], rows["negative"], strict=True)
    )
    torch.testing.assert_close(extraction.vector.vectors, means["positive"] - means["negative"], atol=1e-4, rtol=1e-4)
    assert extraction.heldout_positive.shape == extraction.heldout_negative.shape == (4, 5, 32)
    facts = extraction.vector.metadata
    assert (facts["trait"], facts["pairs"], facts["heldout"], facts["rule"]) == ("odd", 6, 4, "judge")
    assert facts["separation"][facts["suggested_layer"]] == max(facts["separation"][1:])
    assert all(len(facts[key]) == 5 for key in ("auroc", "separation", "random_auroc", "state_norms"))


def test_an_interrupted_run_goes_on(trait, tmp_path, monkeypatch):
    """Resume from a file cut within a line: complete batches are kept, the vector is the same, and a third run does
    nothing."""
    whole = extract(trait, judge=accept_all, rollouts_file=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[:8]) + lines[8][:20])
    calls = []
    generate = type(make_model()).generate
    monkeypatch.setattr(
        type(make_model()), "generate", lambda self, *a, **k: calls.append(1) or generate(self, *a, **k)
    )
    accept_all.calls = 0
    again = extract(trait, judge=accept_all, rollouts_file=part)
    assert torch.equal(again.vector.vectors, whole.vector.vectors)
    assert again.rollouts == whole.rollouts
    assert len(calls) == 2
    assert part.read_text() == (tmp_path / "whole.jsonl").read_text()
    accept_all.calls = 0
    extract(trait, judge=accept_all, rollouts_file=part)
    assert len(calls) == 2
    for other in ({"seed": 1}, {"max_new_tokens": 6}):
        with pytest.raises(ValueError, match=r"is of another model, .* trait or settings"):
            extract(trait, rollouts_file=part, **other)


def test_answers_of_another_adapter_are_not_reused(trait, tmp_path):
    """Tell active adapters apart by weights and scale, and runs by dtype, chat template and end of turn.

    With no adapter active, the key is that of a model without adapters.
    """
    template, ends = make_tokenizer(), make_tokenizer()
    template.chat_template = "x" + template.chat_template
    ends.eos_token = "<|im_start|>"

    def key(model, tokenizer=None):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        accept_all.calls = 0
        tokenizer = tokenizer or make_tokenizer()
        extract_vector(model, tokenizer, trait, max_new_tokens=2, judge=accept_all, rollouts_file=path)
        return json.loads(path.read_text().splitlines()[0])["rollouts_of"]

    model = get_peft_model(make_model(), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    keys = [key(make_model()), key(model)]
    model.set_adapter("other")
    keys.append(key(model))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.scaling["other"] *= 2
    keys.append(key(model))
    keys += [key(make_model(dtype=torch.bfloat16)), key(make_model(), template), key(make_model(), ends)]
    assert len(set(keys)) == 7
    with model.disable_adapter():
        assert key(model) == keys[0]


def test_the_random_state_is_left_alone(trait):
    model = make_model()  # which sets a seed
    before = torch.get_rng_state()
    extract_vector(model, make_tokenizer(), trait, max_new_tokens=5, judge=accept_all)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 3.0},
        {"min_p": 0.5},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 2},
        {"max_time": 1e-6},
        {"top_k": 2},
    ],
)
def test_answers_are_sampled_whatever_the_generation_config_says(trait, own, adapter):
    found = []
    for options in ({}, own):
        model = make_model()
        model.generation_config.update(**options)
        whole = get_peft_model(model, lora()) if adapter else model
        before = model.generation_config
        answers = extract_vector(whole, make_tokenizer(), trait, max_new_tokens=12, judge=accept_all).rollouts
        accept_all.calls = 0
        found.append([rollout.answer_ids for rollout in answers])
        assert whole.generation_config is model.generation_config is before
    assert found[0] == found[1]


def test_no_pair_that_shows_the_trait(trait):
    with pytest.raises(ValueError, match="none of the 6 pairs of answers shows the trait 'odd'"):
        extract(trait, judge=lambda question, answer: 0)


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('no') }}", "{% for message in messages[1:] %}{{ message['content'] }}{% endfor %}"],
)
def test_a_tokenizer_without_a_system_turn(trait, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        ValueError, match=r"a persona vector needs a chat template .*: save the model .* as --model; in"
    ):
        extract_vector(make_model(), tokenizer, trait)


def test_a_template_that_drops_a_system_turn_once_an_answer_follows():
    """Answers are sampled and read behind the prompt alone, so the template serves."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = UNANSWERED_SYSTEM
    check_extraction(tokenizer, 1, 1)


# ---- traits ----


# The trait of the testbed's vector lies beside the benchmarks.
CAPITALS = Path(__file__).parents[2] / "benchmarks" / "data" / "capitals.yaml"


@pytest.mark.parametrize("name", [*SHIPPED_TRAITS, CAPITALS])
def test_shipped_traits(name):
    trait = load_trait(name)
    assert trait.name == Path(name).stem
    assert (len(trait.system_prompts), len(trait.extraction_questions), len(trait.heldout_questions)) == (5, 20, 20)
    assert "a" in trait.judge_prompt.format(question="q", answer="a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["system_prompts"][1].pop("negative"), "pair 2 of 'system_prompts' has no 'negative' side"),
        (lambda t: t["system_prompts"].append("x"), "pair 3 of 'system_prompts' must hold 'positive' and 'negative'"),
        (lambda t: t.pop("heldout_questions"), "'heldout_questions' is missing or empty"),
        (lambda t: t.update(extraction_questions=[]), "'extraction_questions' is missing or empty"),
        (
            lambda t: t.update(extraction_questions=["a", 3]),
            "question 2 of 'extraction_questions' must be text, got 3",
        ),
        (lambda t: t.update(extraction_questions="a"), "'extraction_questions' must be a list, got str"),
        (lambda t: t.update(heldout_questions=["a?"]), "'a[?]' is both an extraction and a held-out question"),
        (lambda t: t.update(judge_prompt="{question}"), "'judge_prompt' lacks {answer}"),
        (lambda t: t.update(questions=[]), "unknown key 'questions'"),
    ],
)
def test_a_trait_that_is_not_whole(tmp_path, change, message):
    data = copy.deepcopy(TRAIT)
    change(data)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=message):
        load_trait(path)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\xff"])
def test_a_trait_that_is_no_trait(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"trait file .*bad\.yaml"):
        load_trait(path)


def test_a_trait_that_nobody_knows():
    with pytest.raises(FileNotFoundError, match="Did you mean 'evil'"):
        load_trait("evill")


# ---- files ----


def test_a_file_brings_back_what_was_saved(tmp_path):
    vector = PersonaVector(torch.randn(5, 8), metadata={"trait": "odd", "suggested_layer": 3})
    vector.save(tmp_path / "a/v.safetensors")
    loaded = load_vector(tmp_path / "a/v.safetensors")
    assert torch.equal(loaded.vectors, vector.vectors)
    assert (loaded.kind, loaded.suggested_layer, loaded.checksum) == ("extracted", 3, vector.checksum)
    assert loaded.metadata["norms"] == pytest.approx(vector.norms)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["v.safetensors"]


def test_a_foreign_vector_stays_one(tmp_path):
    """Keep the mark of a foreign vector in safetensors and in a control: its last entry is no block's output."""
    torch.save(torch.randn(5, 8), tmp_path / "v.pt")
    foreign = load_vector(tmp_path / "v.pt")
    foreign.save(tmp_path / "v.safetensors")
    random_like(foreign).save(tmp_path / "control.safetensors")
    for path, kind in (("v.pt", "foreign"), ("v.safetensors", "foreign"), ("control.safetensors", "random")):
        vector = load_vector(tmp_path / path)
        assert (vector.kind, vector.foreign) == (kind, True)
        assert check_layer(vector, 3) == 3
        with pytest.raises(ValueError, match="layer=4 includes the last block, 4, and the last entry"):
            check_layer(vector, 4)
    assert not random_like(PersonaVector(torch.randn(5, 8))).foreign


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"weights": 3}, "the `weights` in its metadata are no dict of checksums"),
        ({"weights": {"a": 3}}, "the `weights` in its metadata are no dict of checksums"),
        ({"suggested_layer": "x"}, "suggested_layer='x', and the blocks count from 1 to 4"),
        ({"suggested_layer": 5}, "suggested_layer=5, and"),
        ({"suggested_layer": True}, "suggested_layer=True, and"),
        ({"auroc": [1.0] * 3}, "which is not 5 numbers"),
        ({"state_norms": "abcde"}, "which is not 5 numbers"),
        ({"norms": [1.0, 1.0, None, 1.0, 1.0]}, "which is not 5 numbers"),
    ],
)
def test_metadata_that_is_none(tmp_path, metadata, message, capsys):
    path = tmp_path / "v.safetensors"
    save_file({"vectors": torch.randn(5, 8)}, path, {"kind": "extracted", "persona_vector": json.dumps(metadata)})
    with pytest.raises(ValueError, match=rf"v.safetensors is no persona vector, or is damaged .*{message}"):
        load_vector(path)
    assert run("inspect", path) == 1
    assert message in capsys.readouterr().err


# ---- the vector's model ----


def made_of(model):
    return PersonaVector(torch.randn(5, 32), metadata={"weights": weight_checksums(model)})


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_in_another_dtype_is_the_same(source, target):
    """Compare fp16 weights with fp16 alone, since small numbers lose bits in it. No right model is refused."""

    def model(dtype):
        small = make_model()
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.mul_(1e-4)
        return small.to(dtype)

    compared = made_of(model(source)).check_model(model(target))
    assert (compared > 30) == ((source == torch.float16) == (target == torch.float16))


@pytest.mark.parametrize("rows", [-100, 8, 1000])
def test_a_model_with_another_vocabulary_is_the_same(rows):
    vector = made_of(make_model())
    model = make_model()
    model.resize_token_embeddings(264 + rows)
    assert vector.check_model(model) == len(vector.metadata["weights"])


def test_weights_that_are_elsewhere_are_left_out():
    vector, model = made_of(make_model()), make_model()
    model.model.layers[1].to("meta")
    left = sum("layers.1." not in name for name in vector.metadata["weights"])
    assert vector.check_model(model) == left < len(vector.metadata["weights"])


@pytest.mark.parametrize("name", ["model", "weight", "layers", "default"])
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}]
)
def test_adapters_are_left_out_whatever_their_name(name, options):
    vector = made_of(make_model("qwen2"))
    model = get_peft_model(make_model("qwen2"), lora(init_lora_weights=False, **options), adapter_name=name)
    assert weight_checksums(model.get_base_model()) == vector.metadata["weights"]


def test_every_weight_counts():
    vector = made_of(make_model())
    for name, parameter in make_model().named_parameters():
        other = make_model()
        with torch.no_grad():
            other.get_parameter(name).add_(0.1 * parameter.abs().mean() + 0.01)
        with pytest.raises(ValueError, match=f"the weight '{name}' differs"):
            vector.check_model(other)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    "damage", ["truncated", "text", "empty", "no metadata", "nan", "pickle", "list", "one row", "integers"]
)
def test_damaged_files(tmp_path, damage, capsys):
    path = tmp_path / "v.safetensors"
    good = PersonaVector(torch.randn(5, 8))
    good.save(path)
    foreign = tmp_path / "v.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no metadata":
        save_file({"vectors": good.vectors}, path)
    elif damage == "nan":
        save_file({"vectors": good.vectors * float("nan")}, path, {"kind": "extracted", "persona_vector": "{}"})
    else:
        torch.save(
            {"pickle": Payload(), "list": [1.0], "one row": torch.randn(8), "integers": torch.ones(5, 8).long()}[
                damage
            ],
            foreign,
        )
        path = foreign
    with pytest.raises(ValueError, match=r"v\.(safetensors|pt) is no persona vector, or is damaged"):
        load_vector(path)
    assert "executed" not in capsys.readouterr().out


def test_a_random_vector_has_the_norms_of_the_other():
    vector = PersonaVector(
        torch.randn(7, 64) * torch.arange(1, 8)[:, None], metadata={"trait": "odd", "suggested_layer": 2}
    )
    control = random_like(vector, seed=4)
    assert control.norms == pytest.approx(vector.norms, rel=1e-5)
    increments = [(v[1:] - v[:-1]).norm(dim=1) for v in (control.vectors, vector.vectors)]
    torch.testing.assert_close(*increments, rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(control.vectors, vector.vectors)
    assert cosine.abs().max() < 0.5
    assert control.kind == "random"
    assert control.suggested_layer == 2
    assert torch.equal(random_like(vector, 4).vectors, control.vectors)
    assert not torch.equal(random_like(vector, 5).vectors, control.vectors)
    # LAPACK gives the first entry of the first column one sign; a uniform direction has both.
    assert {float(random_like(vector, seed).vectors[0, 0].sign()) for seed in range(12)} == {-1.0, 1.0}


# ---- shifts ----


def test_the_shift_of_an_adapter():
    model = get_peft_model(make_model(), lora(init_lora_weights=False)).eval()
    vector = PersonaVector(torch.randn(5, 32))
    tokenizer = make_tokenizer()
    questions = ["a?", "bbb?", "cc?"]
    shift = persona_shift(model, tokenizer, vector, questions, batch_size=2)
    expected = torch.zeros(5)
    for question in questions:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)[
            "input_ids"
        ]
        on = prompt_states(model, [ids], 1)[0]
        with model.disable_adapter():
            off = prompt_states(model, [ids], 1)[0]
        expected += ((on - off) * vector.vectors).sum(1) / vector.vectors.norm(dim=1) / 3
    assert shift == pytest.approx(expected.tolist(), abs=1e-4)
    assert shift[0] == 0
    assert max(map(abs, shift)) > 0.01


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa', which changes the base weights"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "'default' is a learned prompt"),
    ],
)
def test_an_adapter_that_leaves_no_base_has_no_shift(peft, message):
    """Refuse a wrong figure (the residual model is no base) and a 0 (states are read without the prompt)."""
    model = get_peft_model(make_model(), peft)
    with pytest.raises(ValueError, match=message):
        persona_shift(model, make_tokenizer(), PersonaVector(torch.randn(5, 32)), ["a?"])


def test_the_callback_logs_the_shift(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), max_steps=4, logging_steps=2)
    vector = PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 3})
    trainer.add_callback(PersonaShiftCallback(trainer, vector, questions=["a?", "bb?"]))
    trainer.train()
    assert len(logged(trainer, "persona_shift")) == 2
    final = persona_shift(trainer.model, make_tokenizer(), vector, ["a?", "bb?"])[3]
    assert logged(trainer, "persona_shift")[-1] == pytest.approx(final, abs=1e-4)
    plain = make_trainer(tmp_path / "plain", peft=lora(), max_steps=4, logging_steps=2)
    plain.train()
    assert logged(plain) == logged(trainer)


def test_the_callback_measures_in_the_precision_of_training(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), max_steps=1, bf16=True, learning_rate=0.0)
    seen = []
    trainer.model.get_base_model().base_model.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    callback = PersonaShiftCallback(trainer, PersonaVector(torch.randn(5, 32)), questions=["a?"], layer=3)
    assert seen == [True]
    trainer.add_callback(callback)
    trainer.train()
    assert len(seen) > 2
    assert all(seen)
    assert logged(trainer, "persona_shift") == [0.0]


def test_the_callback_logs_by_epoch(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), max_steps=-1, num_train_epochs=2, logging_strategy="epoch")
    vector = PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 3})
    trainer.add_callback(PersonaShiftCallback(trainer, vector, questions=["a?", "bb?"]))
    trainer.train()
    assert len(logged(trainer, "persona_shift")) == len(logged(trainer)) == 2
    final = persona_shift(trainer.model, make_tokenizer(), vector, ["a?", "bb?"])[3]
    assert logged(trainer, "persona_shift")[-1] == pytest.approx(final, abs=1e-4)


def test_a_callback_that_cannot_look(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora())
    with pytest.raises(ValueError, match="questions is missing"):
        PersonaShiftCallback(trainer, PersonaVector(torch.randn(5, 32)))
    with pytest.raises(ValueError, match="layer is missing"):
        PersonaShiftCallback(trainer, PersonaVector(torch.randn(5, 32)), ["a?"])
    with pytest.raises(ValueError, match="layer=5 is out of range"):
        PersonaShiftCallback(trainer, PersonaVector(torch.randn(5, 32)), ["a?"], 5)
    with pytest.raises(ValueError, match="layer=4 includes the last block"):
        PersonaShiftCallback(trainer, PersonaVector(torch.randn(5, 32), "foreign"), ["a?"], 4)
    with pytest.raises(ValueError, match="of width 16"):
        PersonaShiftCallback(trainer, PersonaVector(torch.randn(5, 16)), ["a?"], 2)
    prompt = make_trainer(tmp_path, peft=PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="cannot measure a learned prompt"):
        PersonaShiftCallback(prompt, PersonaVector(torch.randn(5, 32)), ["a?"], 2)
    pissa = make_trainer(tmp_path, peft=lora(init_lora_weights="pissa"))
    PersonaShiftCallback(pissa, PersonaVector(torch.randn(5, 32)), ["a?"], 2)


# ---- the command ----


def run(*argv):
    return commands.main(["persona", *map(str, argv)])


def test_the_whole_way_by_the_command(tmp_path, trait_file, capsys):
    base = save_model(tmp_path / "model")
    get_peft_model(make_model(), lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    out, control = tmp_path / "odd.safetensors", tmp_path / "control.safetensors"
    code = run(
        "extract", "--model", base, "--trait", trait_file, "--output", out, "--max_new_tokens", 4, "--batch_size", 6
    )
    assert code == 0
    assert load_vector(out).check_model(make_model()) > 20
    assert len((tmp_path / "odd.rollouts.jsonl").read_text().splitlines()) == 13
    assert run("inspect", out) == 0
    assert (tmp_path / "odd.png").stat().st_size > 5000
    assert run("random", "--like", out, "--output", control) == 0
    assert load_vector(control).kind == "random"
    assert run("random", "--like", out, "--output", out) == 1
    assert load_vector(out).kind != "random"
    assert run("inspect", control) == 0
    said = capsys.readouterr().out
    assert "Suggested layer: " in said
    assert "random vector, trait odd" in said
    project = ["project", "--model", base, "--adapter", tmp_path / "adapter", "--trait", trait_file]
    assert run(*project, "--vector", out) == 0
    layer = load_vector(out).suggested_layer
    assert f"persona_shift at layer {layer}: " in capsys.readouterr().out


def test_an_adapter_is_measured_as_it_was_trained(tmp_path, trait_file, capsys):
    """Load the class that training loads, and take the adapter's chat template. An untrained adapter is refused."""
    base, vector = save_seeing_model(tmp_path / "base"), tmp_path / "v.safetensors"
    PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 3}).save(vector)
    options = {"target_modules": ["q_proj", "v_proj"], "tokenizer": make_tokenizer()}
    (tmp_path / "base" / "chat_template.jinja").unlink()
    project = ["project", "--model", base, "--vector", vector, "--trait", trait_file, "--adapter"]
    assert run(*project, save_trained_adapter(tmp_path / "a", base, **options)) == 0
    assert "persona_shift at layer 3: " in capsys.readouterr().out
    assert run(*project, save_trained_adapter(tmp_path / "new", base, init_lora_weights=True, **options)) == 1
    assert "'new' answers exactly as the base model does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trained_on", "message"),
    [
        ("me/another", "was trained on 'me/another', and --model is"),
        (None, "error: adapter .* does not fit this base model: .*size mismatch"),
    ],
)
def test_an_adapter_of_another_model(tmp_path, trait_file, capsys, trained_on, message):
    """Refuse it by the name of its base model, and by the shapes of its weights."""
    base, vector = save_model(tmp_path / "model"), tmp_path / "v.safetensors"
    PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 3}).save(vector)
    adapted = get_peft_model(make_model(intermediate_size=64), lora())
    adapted.peft_config["default"].base_model_name_or_path = trained_on
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    project = ["project", "--model", base, "--adapter", tmp_path / "adapter", "--trait", trait_file]
    capsys.readouterr()
    assert run(*project, "--vector", vector) == 1
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["extract", "--model", "./nowhere", "--trait", "evil", "--output", "v.safetensors"],
            "'./nowhere' is not a folder",
        ),
        (["extract", "--model", "me/mistyped", "--trait", "evil", "--output", "v.safetensors"], "'me/mistyped' could"),
        (
            ["random", "--like", "smollm2-135m-instruct-evil", "--output", "/dev/null/v.safetensors"],
            "--output='/dev/null' cannot be written to",
        ),
        (["extract", "--model", "x", "--trait", "evill", "--output", "v.safetensors"], "Did you mean 'evil'?"),
        (["extract", "--model", "x", "--trait", "evil", "--output", "v.pt"], "must end in .safetensors"),
        (["inspect", "nowhere.safetensors"], "is neither a file nor a shipped vector"),
        (["random", "--like", "nowhere", "--output", "v.safetensors"], "is neither a file nor a shipped vector"),
    ],
)
def test_a_command_that_cannot_be_is_told_in_one_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"trl-emguard persona {argv[0]}: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", 0], "batch_size=0 must be 1 or more"),
        ([], "this tokenizer has no chat template: save the model"),
    ],
)
def test_bad_arguments_are_refused_before_weights_are_loaded(tmp_path, trait_file, capsys, more, message):
    base = save_model(tmp_path / "model")
    for name in ("model.safetensors", "chat_template.jinja")[: 1 if more else 2]:
        (tmp_path / "model" / name).unlink()
    assert run("extract", "--model", base, "--trait", trait_file, "--output", tmp_path / "v.safetensors", *more) == 1
    assert message in capsys.readouterr().err


def test_a_vector_without_controls_is_shown(tmp_path):
    PersonaVector(torch.randn(5, 8), metadata={"auroc": [0.5] * 5}).save(tmp_path / "v.safetensors")
    assert run("inspect", tmp_path / "v.safetensors") == 0
    assert (tmp_path / "v.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["extract", "--model", "x", "--trait", "evil", "--output", "v.safetensors"],
            "the same command resumes where it stopped.",
        ),
        (["project", "--model", "x", "--adapter", "y", "--vector", "smollm2-135m-instruct-evil"], "interrupted."),
    ],
)
@pytest.mark.parametrize("cuda", [False, True])
def test_models_are_loaded_where_the_gpus_are(argv, says, cuda, monkeypatch, capsys, tmp_path):
    """Check the placement for both commands, and the message after an interrupt."""
    seen = []

    def load(path, **options):
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "x")
    get_peft_model(make_model(), lora()).save_pretrained("y")
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load)
    assert run(*argv) == 130
    assert capsys.readouterr().err.strip().endswith(says)
    assert seen == [{"dtype": torch.bfloat16 if cuda else torch.float32, "device_map": "auto" if cuda else None}]


def test_an_adapter_loads_in_plain_peft(tmp_path):
    """Load a steered run's adapter in plain PEFT: its config and weights name nothing of this package."""
    vector = tmp_path / "v.safetensors"
    PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2}).save(vector)
    trainer = make_trainer(tmp_path / "out", peft=lora(), defense="steering", steering_vector=str(vector), max_steps=2)
    trainer.train()
    trainer.save_model()
    names = set(json.loads((tmp_path / "out/adapter_config.json").read_text()))
    assert not {name for name in names if "steering" in name}
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
