"""Drift while a run trains: its figures, the budget, resumption, and a training that it does not change."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from private import hooks_of
from safetensors import safe_open
from tiny import config, logged, lora, make_model, make_rows, make_tokenizer, make_trainer
from transformers import ProcessorMixin, TrainerCallback
from trl import SFTTrainer

from trl_emguard import DriftCallback, EMACallback, EMGuardTrainer
from trl_emguard.evaluation import EvaluationOptions, Question, QuestionSet, evaluate, from_adapters
from trl_emguard.evaluation.candidates import Candidate
from trl_emguard.evaluation.drift_probe import DriftProbe
from trl_emguard.evidence import read_defense_file
from trl_emguard.persona.shift import PersonaShiftCallback
from trl_emguard.persona.vectors import PersonaVector


METRICS = ("drift_kl", "drift_margin", "drift_persona")
# One question has no misaligned answer, so that the margin and the divergence have other questions.
GENERAL = QuestionSet(
    "general",
    "general",
    [
        Question(str(i), [{"role": "user", "content": f"Why {'so ' * i}?"}], "good " * (i + 1), "vile " * (4 - i))
        for i in range(4)
    ]
    + [Question("4", [{"role": "user", "content": "And?"}], answer="well ")],
)
SAVES = {"save_strategy": "steps", "save_steps": 3}


def vector():
    torch.manual_seed(3)
    return PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2})


def drift(**options):
    return DriftCallback(**{"every": 1, "questions": GENERAL, **options})


class Weights(TrainerCallback):
    """Keeps all weights after each step, those of the start first."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps = []
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


class Upload(TrainerCallback):
    """Keeps the weights that a tracker would upload at the end of training."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}


def train(folder, *callbacks, resume=None, peft=True, **options):
    trainer = make_trainer(folder, peft=lora(lora_dropout=0.2) if peft else None, **{"max_steps": 6, **options})
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_defaults_are_the_shipped_questions():
    callback = DriftCallback()
    assert len(callback.questions.questions) == 16
    assert all(question.sound and question.misaligned for question in callback.questions.questions)


# ---- figures ----


@pytest.mark.parametrize("defense", ["none", "kl"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "lora", "modules_to_save"])
def test_figures_equal_those_of_an_evaluation(tmp_path, architecture, defense):
    """Full fine-tuning with a tied head and with one of its own, and adapters."""
    is_full = architecture in ("llama", "qwen2")
    model = make_model(architecture if is_full else "llama", tie_word_embeddings=architecture != "qwen2")
    peft = None if is_full else lora(modules_to_save=["norm"] if architecture == "modules_to_save" else None)
    trainer = make_trainer(tmp_path, model, peft=peft, defense=defense, max_steps=4)
    trainer.add_callback(drift(every=2, persona_vector=vector()))
    trainer.train()
    tuned = trainer.model.eval()
    if is_full:
        base = make_model(architecture, tie_word_embeddings=architecture != "qwen2").eval()
        candidates = [*from_adapters(base), Candidate("default", tuned, "tuned")]
    else:
        candidates = from_adapters(tuned, ["default"])
    results = evaluate(
        candidates, make_tokenizer(), [GENERAL], EvaluationOptions(cues="none", persona_vector=vector())
    )
    for metric, of_evaluation in zip(METRICS, ("kl_to_base", "margin", "persona_shift"), strict=True):
        values = logged(trainer, metric)
        assert len(values) == 2
        assert values[-1] == pytest.approx(results.row("default", "general", of_evaluation).difference, abs=2e-5)
        assert abs(values[-1]) > 1e-3


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("peft", [True, False])
def test_an_unmoved_model_has_no_drift(precision, peft):
    model = make_model()
    model = get_peft_model(model, lora()) if peft else model
    probe = DriftProbe(model, make_tokenizer(), GENERAL, vector(), precision)
    probe.read_base()
    assert probe.measure() == dict.fromkeys(METRICS, 0.0)


class Processor(ProcessorMixin):
    """Processor of a vision-language model. Its template is its own, and its tokenizer has none."""

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


def test_a_processor_is_asked_by_its_tokenizer(tmp_path):
    def drifts(processing_class):
        rows = Dataset.from_list([{"input_ids": list(range(9, 20 + i))} for i in range(8)])
        options = {"train_dataset": rows, "processing_class": processing_class, "callbacks": [drift()]}
        trainer = EMGuardTrainer(make_model(), config(tmp_path, max_steps=2), **options)
        trainer.add_callback(PersonaShiftCallback(trainer, vector(), ["Why?"]))
        trainer.train()
        return logged(trainer, "drift_kl"), logged(trainer, "persona_shift")

    tokenizer = make_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    processor = Processor(tokenizer, chat_template=template)
    assert drifts(processor) == drifts(make_tokenizer())
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("is_first", [True, False])
def test_a_line_beside_that_of_an_epoch_shows_the_shift_of_its_own_step(tmp_path, is_first):
    """The last step of an epoch has a line already, so its second measurement is not logged."""

    def shifts(folder, *before, **options):
        trainer = make_trainer(tmp_path / folder, peft=lora(), max_steps=-1, num_train_epochs=2, **options)
        shift = PersonaShiftCallback(trainer, vector(), ["Why?"])
        for callback in (shift, *before) if is_first else (*before, shift):
            trainer.add_callback(callback)
        trainer.train()
        return {
            entry["step"]: entry["persona_shift"]
            for entry in trainer.state.log_history
            if "loss" in entry and "persona_shift" in entry
        }, trainer.state.max_steps

    steps, last = shifts("steps", logging_steps=1)
    assert len(steps) == last
    found, _ = shifts("epoch", drift(every=last // 4), logging_strategy="epoch")
    assert found == {step: steps[step] for step in found}
    assert found or is_first  # before the other callback asks for a line, the shift does not know of it


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (9, [6])])
def test_steps_of_measurement(tmp_path, every, steps):
    trainer = train(tmp_path, drift(every=every), logging_steps=5)
    assert [entry["step"] for entry in trainer.state.log_history if "drift_kl" in entry] == steps


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("budget", [None, 1e9])
def test_training_is_the_same_bit_for_bit(tmp_path, peft, budget):
    with_drift, without = Weights(), Weights()
    callback = drift(budget=budget, persona_vector=vector())
    options = {"peft": peft, "gradient_accumulation_steps": 2}
    one = train(tmp_path / "a", callback, with_drift, **options)
    state = torch.get_rng_state()
    two = train(tmp_path / "b", without, **options)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(with_drift.steps, without.steps, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    drop = {"train_runtime", "train_samples_per_second", "train_steps_per_second", *METRICS}
    logs = [[{k: v for k, v in e.items() if k not in drop} for e in t.state.log_history] for t in (one, two)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("peft", [True, False])
def test_a_measurement_leaves_the_model_as_it_was(peft):
    model = make_model()
    model = get_peft_model(model, lora(lora_dropout=0.2)) if peft else model
    model.train()
    model.get_input_embeddings().eval()

    def look():
        modules = [(module.training, len(hooks_of(module))) for module in model.modules()]
        return modules, [weight.requires_grad for weight in model.parameters()]

    probe = DriftProbe(model, make_tokenizer(), GENERAL, vector())
    before, state = look(), torch.get_rng_state()
    probe.read_base()
    probe.measure()
    assert look() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("asked", ["bf16", None])
def test_a_measurement_has_the_precision_of_training(tmp_path, monkeypatch, asked):
    """`accelerate launch --mixed_precision bf16` sets the precision by this variable alone."""
    if asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    callback = drift()
    trainer = train(tmp_path, callback, bf16=False, max_steps=1)
    assert trainer.accelerator.mixed_precision == (asked or "no")
    assert callback.probe.precision == (torch.bfloat16 if asked else None)


# ---- the budget ----


@pytest.fixture(params=[True, False], ids=["lora", "full"])
def run(request, tmp_path):
    """Return the drift of each of six steps, the weights before and after them, and a way to train so again."""
    weights = Weights()
    trainer = train(tmp_path / "all", drift(), weights, peft=request.param)
    return logged(trainer, "drift_kl"), weights.steps, request.param


def test_training_stops_and_keeps_the_last_weights_within_the_budget(tmp_path, run, capsys):
    kl, weights, peft = run
    budget = (max(kl[:2]) + kl[3]) / 2
    stop = next(step for step, value in enumerate(kl, start=1) if value > budget)
    assert stop > 2  # else there is no step within the budget
    upload = Upload()
    trainer = train(tmp_path / "out", upload, drift(budget=budget), peft=peft, save_strategy="steps", save_steps=stop)
    assert logged(trainer, "drift_kl") == kl[:stop]
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, weights[stop - 1][name])
        assert torch.equal(upload.weights[name], weights[stop - 1][name])
    found = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert found == {"stop_on_drift": budget, "step": stop - 1, "drift_kl": kl[stop - 2], "trained_to": stop}
    assert f"at step {stop}. The model is now that of step {stop - 1}," in capsys.readouterr().out
    trainer.save_model(str(tmp_path / "saved"))
    assert read_defense_file(tmp_path / "saved")["global_step"] == stop - 1
    assert read_defense_file(tmp_path / "out" / f"checkpoint-{stop}")["global_step"] == stop
    name = "adapter_model" if peft else "model"
    with safe_open(tmp_path / "saved" / f"{name}.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kept = {key.replace(".default", ""): value for key, value in weights[stop - 1].items()}
    assert saved
    assert all(torch.equal(value, kept[key]) for key, value in saved.items())


def test_kept_weights_are_copied_into_the_same_memory(tmp_path):
    class Places(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append({name: weight.data_ptr() for name, weight in callback.kept.items()})

    found = []
    callback = drift(budget=1e9)
    train(tmp_path, callback, Places())
    assert found == [found[0]] * 6
    assert found[0]


def test_a_second_trainer_keeps_weights_of_its_own(tmp_path):
    """Copies of the first trainer's weights have another shape and dtype."""
    callback = drift(budget=1e9)
    for rank, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        model = get_peft_model(make_model(), lora(r=rank)).to(dtype)
        trainer = make_trainer(tmp_path / str(rank), model, max_steps=1)
        trainer.add_callback(callback)
        trainer.train()
        for name, weight in trainer.model.named_parameters():
            assert not weight.requires_grad or torch.equal(callback.kept[name], weight)
            assert not weight.requires_grad or callback.kept[name].dtype == dtype


def test_a_run_within_its_budget_is_left_as_it_is(tmp_path, run, capsys):
    kl, weights, peft = run
    trainer = train(tmp_path / "out", drift(budget=2 * max(kl), every=4), peft=peft)
    assert all(torch.equal(weight, weights[6][name]) for name, weight in trainer.model.named_parameters())
    assert json.loads((tmp_path / "out" / "drift.json").read_text())["step"] == 6
    assert "The model is now" not in capsys.readouterr().out


def test_no_step_within_the_budget_gives_the_untrained_model(tmp_path, run, capsys):
    _, weights, peft = run
    trainer = train(tmp_path / "out", drift(budget=1e-9, every=2), peft=peft)
    assert trainer.state.global_step == 2
    assert all(torch.equal(weight, weights[0][name]) for name, weight in trainer.model.named_parameters())
    assert "untrained: measure more often" in capsys.readouterr().out


def test_a_trained_adapter_starts_with_its_drift(tmp_path):
    """It is kept with the drift that it has, and refused if that is beyond the budget."""
    train(tmp_path / "first", drift(), max_steps=3).save_model(str(tmp_path / "adapter"))

    def again(budget):
        model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
        trainer = make_trainer(tmp_path / "out", model, max_steps=2, learning_rate=0.1)
        trainer.add_callback(drift(budget=budget))
        trainer.train()
        return trainer.model, json.loads((tmp_path / "out" / "drift.json").read_text())

    probe = DriftProbe(PeftModel.from_pretrained(make_model(), tmp_path / "adapter"), make_tokenizer(), GENERAL)
    probe.read_base()
    start = probe.measure()["drift_kl"]
    with pytest.raises(ValueError, match=r"stop_on_drift=.* is below the drift that the model has before training"):
        again(start / 2)
    model, found = again(start * 1.0001)
    assert (found["step"], found["trained_to"]) == (0, 1)
    assert found["drift_kl"] == pytest.approx(start)
    weights = PeftModel.from_pretrained(make_model(), tmp_path / "adapter").state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


# ---- resuming ----


def test_a_date_that_the_rows_fix_is_the_same_when_a_run_resumes(tmp_path):
    """Ask the questions with the training rows' `chat_template_kwargs`, also if the rows are packed."""
    rows = make_rows().add_column("chat_template_kwargs", [{"date": "May"}] * 16)
    options = {"max_steps": 2, "packing": True, "max_length": 64, "save_strategy": "steps", "save_steps": 1}
    for today, resume in (("Monday", None), ("Tuesday", str(tmp_path / "checkpoint-1"))):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = f"{{{{ date or '{today}' }}}}" + tokenizer.chat_template
        trainer = make_trainer(tmp_path, rows=rows, peft=lora(), processing_class=tokenizer, **options)
        trainer.add_callback(drift())
        trainer.train(resume_from_checkpoint=resume)
    assert len(logged(trainer, "drift_kl")) == 2


@pytest.mark.parametrize("every", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_resumed_run_measures_the_same(tmp_path, run, every):
    """The kept step is that of the checkpoint or one before it, and training ends beyond the budget or within it."""
    kl, _, peft = run
    for budget in (None, 2 * max(kl), kl[every - 1] * 1.001):
        options = {"peft": peft, **SAVES}
        whole = train(tmp_path / "out", drift(every=every, budget=budget), **options)
        (tmp_path / "out" / "checkpoint-3").rename(tmp_path / "moved")
        again = drift(every=every, budget=budget)
        resumed = train(tmp_path / "new", again, resume=str(tmp_path / "moved"), **options)
        assert logged(resumed, "drift_kl") == logged(whole, "drift_kl")
        expected = dict(whole.model.named_parameters())
        assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.named_parameters())
        for folder in ("out", "new", "moved"):
            shutil.rmtree(tmp_path / folder)


def test_a_resume_after_the_stop_trains_on_only_with_a_higher_budget(tmp_path, run):
    kl, _, peft = run
    budget = (max(kl[:2]) + kl[3]) / 2
    stop = next(step for step, value in enumerate(kl, start=1) if value > budget)
    options = {"peft": peft, "save_strategy": "steps", "save_steps": stop}
    stopped = train(tmp_path / "out", drift(budget=budget), **options)
    raised = kl[stop - 1] * 1.001
    beyond = next((step for step in range(stop + 1, 7) if kl[step - 1] > raised), None)
    for allowed, kept, last in ((budget, stop - 1, stop), (raised, beyond - 1 if beyond else 6, beyond or 6)):
        resume = str(tmp_path / "out" / f"checkpoint-{stop}")
        resumed = train(tmp_path / "new", drift(budget=allowed), resume=resume, **options)
        found = json.loads((tmp_path / "new" / "drift.json").read_text())
        assert (found["step"], resumed.state.global_step) == (kept, last)
        if last == stop:
            expected = dict(stopped.model.named_parameters())
            assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.named_parameters())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "holds no drift.safetensors"),
        ("foreign", "holds no drift.safetensors"),
        ("damaged", "is damaged"),
        ("questions", "was written with other questions"),
        ("vector", "was written with other questions"),
        ("precision", "was written with other questions"),
        ("budget", "was written with other questions"),
        ("stricter", "stop_on_drift=0.001 is below the drift of the weights that the checkpoint keeps"),
    ],
)
def test_a_checkpoint_without_this_drift_is_refused(tmp_path, monkeypatch, fault, message):
    train(tmp_path, drift(budget=1e9 if fault == "stricter" else None), **SAVES)
    path, options = tmp_path / "checkpoint-3" / "drift.safetensors", {}
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()  # it would find most damage by itself
    if fault == "missing":
        path.unlink()
    elif fault == "foreign":  # of the same names and shapes, and of other weights
        shutil.copyfile(tmp_path / "checkpoint-6" / "drift.safetensors", path)
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif fault == "precision":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    else:
        fewer = QuestionSet("general", "general", GENERAL.questions[:3])
        options = {"questions": {"questions": fewer}, "vector": {"persona_vector": vector()}, "budget": {"budget": 1}}
        options = options.get(fault, {"budget": 0.001})
    with pytest.raises(ValueError, match=message):
        train(tmp_path, drift(**options), resume=str(tmp_path / "checkpoint-3"), **SAVES)


def test_a_second_training_keeps_its_base_and_its_budget(tmp_path):
    """The model that it starts from is no new base, though no adapter can be switched off."""
    callback = drift()
    trainer = train(tmp_path, callback, peft=False, max_steps=2)
    trainer.train()
    probe = DriftProbe(make_model(), make_tokenizer(), GENERAL)
    probe.read_base()
    again = DriftProbe(trainer.model, make_tokenizer(), GENERAL)
    again.base = probe.base
    drift_kl = again.measure()["drift_kl"]
    assert logged(trainer, "drift_kl")[-1] == pytest.approx(drift_kl, rel=1e-4)
    callback.budget = drift_kl / 2
    with pytest.raises(ValueError, match="is below the drift that the model has before training"):
        trainer.train()


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0 must be 1 or more"),
        ({"budget": 0.0}, r"stop_on_drift=0.0 \(budget\) must be above 0"),
        ({"budget": float("nan")}, "must be above 0"),
        ({"questions": QuestionSet("g", "general", [Question("0", GENERAL.questions[0].prompt)])}, "have no answers"),
        ({"persona_vector": PersonaVector(torch.ones(5, 32))}, "layer is missing"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        drift(**options)


@pytest.mark.parametrize("every", [6, 50])
def test_a_budget_that_only_the_last_step_meets_is_refused(tmp_path, every):
    with pytest.raises(ValueError, match=f"every {every} steps, and the run has 6.*to less than 6"):
        train(tmp_path, drift(every=every, budget=1.0))


def test_a_budget_in_a_run_of_one_step(tmp_path):
    """Its only step cannot be measured earlier."""
    assert train(tmp_path, drift(every=50, budget=1e9), max_steps=1).state.global_step == 1


def test_another_trainer_is_refused(tmp_path):
    rows, tokenizer = make_rows(), make_tokenizer()
    trainer = SFTTrainer(make_model(), config(tmp_path), train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(drift())
    with pytest.raises(ValueError, match="take EMGuardTrainer"):
        trainer.train()


def test_an_adapter_that_changes_the_base_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(init_lora_weights="pissa"))
    trainer.add_callback(drift())
    with pytest.raises(ValueError, match="changes the base weights"):
        trainer.train()
    # A callback that is given to the trainer refuses the adapter before training.
    with pytest.raises(ValueError, match="changes the base weights"):
        EMGuardTrainer(
            make_model(),
            config(tmp_path),
            train_dataset=make_rows(),
            processing_class=make_tokenizer(),
            peft_config=lora(init_lora_weights="pissa"),
            callbacks=[drift()],
        )


def test_a_vector_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    weights = {"model.norm.weight": "0"}
    trainer.add_callback(
        drift(persona_vector=PersonaVector(torch.ones(5, 32), metadata={"suggested_layer": 2, "weights": weights}))
    )
    with pytest.raises(ValueError, match="was made with another model"):
        trainer.train()


# ---- beside other ways to stop ----


class StopAt(TrainerCallback):
    """Stops after a step, once the callbacks of that step are over, as EarlyStoppingCallback does."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("is_within", [True, False])
def test_a_run_that_something_else_stops(tmp_path, run, capsys, is_within):
    """Its last step was not measured: it is kept if it is within the budget, and only then."""
    kl, _, peft = run
    weights = Weights()  # an evaluation draws random numbers, so they are those of this run alone
    trainer = make_trainer(
        tmp_path / "out",
        peft=lora(lora_dropout=0.2) if peft else None,
        max_steps=6,
        eval_dataset=make_rows(),
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.add_callback(drift(budget=2 * max(kl) if is_within else 1e-9, every=5))
    trainer.add_callback(StopAt(3))
    trainer.add_callback(weights)
    trainer.train()
    assert trainer.state.global_step == 3
    kept = weights.steps[3 if is_within else 0]
    assert all(torch.equal(weight, kept[name]) for name, weight in trainer.model.named_parameters())
    assert ("The model is now" in capsys.readouterr().out) != is_within
    assert not logged(trainer, "drift_kl")


def test_an_average_and_a_budget_are_refused(tmp_path):
    train(tmp_path, drift(), EMACallback(), max_steps=1)
    with pytest.raises(ValueError, match=r"stop_on_drift=1 \(budget\) does not work with ema=True"):
        train(tmp_path, EMACallback(), drift(budget=1.0))


def test_the_best_model_and_a_budget_are_refused(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, **SAVES}
    with pytest.raises(ValueError, match="stop_on_drift does not work with load_best_model_at_end=True"):
        train(tmp_path, drift(budget=1.0), eval_dataset=make_rows(), **best)
