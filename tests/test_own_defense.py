"""Test defenses from outside of the package that use every hook: they train, log, resume and describe themselves."""

import json
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tiny import config, logged, lora, make_model, make_rows, make_tokenizer, make_trainer, record
from transformers import TrainerCallback
from twin import first_gradients, relative_error

from trl_emguard import EMGuardConfig, EMGuardTrainer, InactiveDefenseError, ReferenceDefense, register
from trl_emguard.defenses import DEFENSES, Defense, Marks, ModelDefense
from trl_emguard.defenses.options import option
from trl_emguard.defenses.step import MARKS
from trl_emguard.planning.engine import read_launch
from trl_emguard.planning.plan import Plan
from trl_emguard.planning.report import describe


HOOKS: list[str] = []


@dataclass
class AnchorOptions:
    anchor_coef: float = option(0.5, "Weight of the distance.")
    anchor_rows: int = option(2, "Rows that are added to every batch.")
    anchor_word: str = option("anchor", "Word that every added row answers with.")


@dataclass
class AnchorConfig(AnchorOptions, EMGuardConfig):
    pass


class Anchor(ReferenceDefense):
    """Distance of the last block on rows of its own, which its loader adds to every batch."""

    name = "anchor"
    Options = AnchorOptions
    switch = "anchor_coef"
    scopes = ("anchored",)
    tokens = "anchored"
    running_metrics = ("anchor_rows",)

    def __init__(self, args):
        HOOKS.append("built")
        self.weigh(args.anchor_coef)
        self.count, self.word = args.anchor_rows, args.anchor_word
        self.seen = 0
        self.passes = 0

    @classmethod
    def check_options(cls, args):
        if args.anchor_rows < 1:
            raise ValueError(f"anchor_rows={args.anchor_rows}: give 1 or more.")

    @classmethod
    def check_with(cls, args, others):
        HOOKS.append(f"beside {sorted(other.name for other in others)}")

    def options(self):
        return {"anchor_coef": self.coefficient, "anchor_rows": self.count, "anchor_word": self.word}

    def describe(self):
        return [f"{self.count} anchors in every batch."]

    def check_tuning(self, has_adapter):
        HOOKS.append("adapter" if has_adapter else "model")

    def check_model(self, config):
        HOOKS.append(f"model of {config.num_hidden_layers} blocks")

    def prepare_rows(self, rows):
        HOOKS.append(f"{len(rows)} rows")
        return rows

    def check_tokenizer(self, tokenizer):
        HOOKS.append("tokenizer")

    def prepare_tokenized(self, rows, tokenizing):
        own = [
            {
                "prompt": [{"role": "user", "content": f"hold {i}"}],
                "completion": [{"role": "assistant", "content": self.word}],
            }
            for i in range(self.count)
        ]
        self.rows = tokenizing.prepare(Dataset.from_list(own), "anchors").select_columns(["input_ids", "labels"])
        return rows

    def train_loader(self, loading):
        def collate(rows):
            own = [dict(row) for row in self.rows]
            batch = loading.collator([*rows, *own])
            marks = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            marks[len(rows) :] = True
            return {**batch, "anchored": marks}

        return replace(loading, collator=collate)

    def extra_rows(self):
        return self.rows

    def check_policy(self, model):
        HOOKS.append(type(model).__name__)

    @contextmanager
    def training(self, model):
        HOOKS.append("training begins")
        yield
        HOOKS.append("training ends")

    def read_batch(self, batch):
        marks = batch.pop("anchored")
        return Marks({"anchored": marks}, {"rows": marks.any(1).sum()})

    def layers(self, num_layers):
        return (num_layers,)

    def token_loss(self, policy, reference):
        return (policy[0] - reference[0]).float().square().mean(-1)

    def end_step(self, step):
        self.seen += int(step.sums["anchor/rows"])
        return {**super().end_step(step), "anchor_rows": self.seen, "anchor_ce": step.sums["ce/anchored"]}

    def begin(self, evidence):
        self.seen = int(evidence.get("rows", 0))
        super().begin(evidence)

    def save(self, folder):
        (Path(folder) / "anchor.txt").write_text(str(self.seen))

    def load(self, folder):
        self.loaded = (Path(folder) / "anchor.txt").read_text()

    def evidence(self):
        return {**super().evidence(), "rows": self.seen}

    def verdict(self, final=False):
        if self.word == "give up" and self.seen:
            return "defense 'anchor' gives up."
        return super().verdict(final)


class Weights(ModelDefense):
    """Mean square of the embedding's weights."""

    name = "weights"

    def __init__(self, args):
        self.coef = 3.0

    def model_states(self, model, batch):
        return [model.get_input_embeddings().weight]

    def model_loss(self, states):
        return states[0].square().mean()


class Numbered(Defense):
    """A column with each token plus 1, compared with the tokens in every batch."""

    name = "numbered"
    token_columns = ("numbers",)

    def __init__(self, args):
        self.tokens = 0

    def prepare_tokenized(self, rows, tokenizing):
        return rows.map(lambda row: {"numbers": [token + 1 for token in row["input_ids"]]})

    def read_batch(self, batch):
        numbers, ids = batch.pop("numbers"), batch["input_ids"]
        told = numbers > 0
        assert torch.equal(numbers[told] - 1, ids[told])
        assert int(told.sum()) == int(batch.get("attention_mask", torch.ones_like(ids)).sum())
        self.tokens += int(told.sum())
        return Marks()


@dataclass
class SwitchedOptions:
    noise: float = option(1.0, "Size of the noise. 0 switches it off.")
    places: tuple = option((1, 2), "Blocks that get it.")


@dataclass
class SwitchedConfig(SwitchedOptions, EMGuardConfig):
    pass


class Switched(Defense):
    """A defense without a term, whose options are only declared."""

    name = "switched"
    Options = SwitchedOptions
    switch = "noise"

    def prepare_rows(self, rows):
        return rows.select(range(8))


class Drawn(ReferenceDefense):
    """A distance on positions that are drawn anew whenever a batch is read."""

    name = "drawn"
    tokens = "drawn"
    scopes = ("drawn",)

    def __init__(self, args):
        self.coef = 10.0
        self.batches = 0
        self.dice = torch.Generator().manual_seed(0)

    def read_batch(self, batch):
        self.batches += 1
        return Marks({"drawn": torch.rand(batch["input_ids"].shape, generator=self.dice) < 0.5})

    def layers(self, num_layers):
        return (num_layers,)

    def token_loss(self, policy, reference):
        return (policy[0] - reference[0]).square().mean(-1)


@dataclass
class PrependedOptions:
    prepended_scale: float | None = option(None, "Factor of the embeddings in training, by default 0.5.")
    prepended_on: bool = option(True, "Whether the defense is on.")


@dataclass
class PrependedConfig(PrependedOptions, EMGuardConfig):
    pass


class Prepended(Defense):
    """Rows of the trainer's pool before those of a stream, a column of every row, and smaller embeddings."""

    name = "prepended"
    Options = PrependedOptions
    inputs = ("interleave_dataset",)
    columns = ("size",)
    scopes = ("sized",)

    def __init__(self, args, interleave_dataset):
        self.pool = interleave_dataset
        self.given_scale = args.prepended_scale
        self.scale = 0.5 if self.given_scale is None else self.given_scale
        self.sizes, self.passes = [], 0

    @classmethod
    def is_on(cls, args):
        return args.prepended_on

    @property
    def active(self):
        return self.pool is not None

    def meet(self, others):
        HOOKS.append(f"meets {[other.name for other in others]}")

    def options(self):
        return {"scale": self.scale}

    def options_like(self, then, is_on_all_ranks):
        # The value that is left open is the checkpoint's, which an earlier version called "ratio".
        (key,) = then
        return {key: then[key] if self.given_scale is None else self.scale}

    def continue_from(self, options):
        (self.scale,) = options.values()

    def describe(self):
        return [f"{len(self.pool)} rows come first."]

    def prepare_tokenized(self, rows, tokenizing):
        self.own = tokenizing.prepare(self.pool, "pool").select_columns(["input_ids", "labels"])
        return rows

    def add_rows(self, rows, plan):
        assert plan.rows is None
        own = self.own.cast_column("input_ids", self.own.features["labels"]).add_column("size", [-1] * len(self.own))
        return concatenate_datasets([own.to_iterable_dataset(), rows])

    def train_loader(self, loading):
        def collate(rows):
            sizes = torch.tensor([row["size"] for row in rows])
            return {**loading.collator(rows), "size": sizes}

        return replace(loading, collator=collate)

    def read_batch(self, batch):
        sizes = batch.pop("size")
        self.sizes.append(sizes.tolist())
        return Marks({"sized": (sizes >= 0)[:, None].expand_as(batch["input_ids"])}, {"added": (sizes < 0).sum()})

    @contextmanager
    def policy_pass(self, model, batch):
        self.passes += 1
        handle = model.get_input_embeddings().register_forward_hook(lambda *hooked: hooked[-1] * self.scale)
        yield
        handle.remove()

    def end_step(self, step):
        return {"prepended_rows": step.sums["prepended/added"]}


class Watching(Defense):
    """A defense without a term that marks tokens, and sees its marks in the policy's pass."""

    name = "watching"
    scopes = ("odd",)

    def __init__(self, args):
        self.seen = []

    def read_batch(self, batch):
        return Marks({"odd": batch["input_ids"] % 2 == 1})

    def policy_pass(self, model, batch):
        self.seen.append(torch.equal(batch[MARKS].scopes["odd"], batch["input_ids"] % 2 == 1))
        return nullcontext()


OWN = (Anchor, Weights, Numbered, Switched, Drawn, Prepended, Watching)


@pytest.fixture(autouse=True)
def registered():
    shipped = dict(DEFENSES)
    for defense in OWN:
        register(defense)
    HOOKS.clear()
    yield
    DEFENSES.clear()
    DEFENSES.update(shipped)


def make(folder, **options):
    args = config(folder)
    fields = {
        key: getattr(args, key)
        for key in ("per_device_train_batch_size", "learning_rate", "logging_steps", "max_length")
    }
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": False}
    options = {
        "activation_checkpointing": False,
        "defense": "anchor",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **fields,
        **given,
        **options,
    }
    return EMGuardTrainer(
        make_model(),
        AnchorConfig(str(folder), **options),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=None if options["defense"] == "weights" else lora(),
    )


def planned(trainer):
    """Return the lines of a dry run's report, as {subject: [text, …]}."""
    found = {}
    for about, text in describe(Plan.of(trainer, read_launch(None)), "tiny"):
        found.setdefault(about, []).append(text)
    return found


def test_every_hook_is_called_in_the_order_of_a_run(tmp_path):
    trainer = make(tmp_path, defense="kl,anchor", kl_coef=0.1)
    trainer.train()
    assert HOOKS.count("built") == 1
    order = [hook for hook in HOOKS if not hook.startswith("beside")]
    assert order == [
        "built", "adapter", "model of 4 blocks", "16 rows", "tokenizer", "LlamaForCausalLM", "training begins",
        "training ends",
    ]  # fmt: skip
    assert "beside ['kl']" in HOOKS
    assert "2 anchors in every batch." in trainer.describe()


def test_it_logs_its_own_metrics_and_proves_itself(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    assert logged(trainer, "anchor_rows") == [2, 4, 6, 8]
    assert logged(trainer, "anchor")[0] == 0
    assert logged(trainer, "anchor")[-1] > 0
    assert len(logged(trainer, "anchor_ce")) == 4
    trainer.save_model()
    saved = json.loads((tmp_path / "defense.json").read_text())
    assert saved["defenses"] == {"anchor": {"anchor_coef": 0.5, "anchor_rows": 2, "anchor_word": "anchor"}}
    assert saved["evidence"]["anchor"]["acted"] is True
    assert saved["evidence"]["anchor"]["rows"] == 8


def test_the_plan_says_where_it_acts(tmp_path):
    trainer = make(tmp_path, defense="anchor")
    about = planned(trainer)
    (term,) = about["anchor"]
    place = r"at positions that predict a label marked 'anchored', about \d+ a step"
    assert re.fullmatch(f"weight 0.5 on the outputs of blocks 4, {place}", term)
    assert "2 anchors in every batch." in about["defense"]


def test_it_resumes(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    whole = make(tmp_path / "whole")
    whole.train()
    part = make(tmp_path / "part")
    part.add_callback(Stop())
    part.train()
    again = make(tmp_path / "part")
    again.train(resume_from_checkpoint=True)
    assert logged(again, "loss") == logged(whole, "loss")
    assert again.defenses[0].evidence() == whole.defenses[0].evidence()
    assert again.defenses[0].loaded == "4"
    assert not (tmp_path / "whole" / "anchor.txt").exists()
    with pytest.raises(ValueError, match="anchor_rows=3"):
        make(tmp_path / "part", anchor_rows=3).train(resume_from_checkpoint=True)


def test_its_verdict_stops_the_run(tmp_path):
    trainer = make(tmp_path, anchor_word="give up")
    with pytest.raises(InactiveDefenseError, match="gives up"):
        trainer.train()
    assert (Path(tmp_path) / "checkpoint-1" / "defense.json").is_file()


def test_its_options_are_checked_and_switch_it_off(tmp_path):
    with pytest.raises(ValueError, match="anchor_rows=0"):
        make(tmp_path, anchor_rows=0)
    assert make(tmp_path, anchor_coef=0.0).defenses == []


def test_its_coefficient_may_have_a_schedule(tmp_path):
    trainer = make(tmp_path, anchor_coef="1.5->0")
    trainer.train()
    assert logged(trainer, "anchor_coef") == [1.5, 1.0, 0.5, 0.0]
    assert trainer.defenses[0].options()["anchor_coef"] == "1.5->0"


@pytest.mark.parametrize(("batch", "accumulation"), [(16, 1), (4, 4), (3, 6)])
def test_a_term_of_the_model_counts_once_in_a_step(tmp_path, batch, accumulation):
    """Find the plain gradient and the term's own in the sum, however the step is cut."""
    step = {"max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no"}
    cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = make(tmp_path, defense="weights", **step, **cut)
    weight = trainer.model.get_input_embeddings().weight.detach().clone()
    ours = first_gradients(trainer)
    assert logged(trainer, "weights") == pytest.approx([weight.square().mean().item()])
    assert trainer.defenses[0].evidence()["positions"] == 1
    plain = make(tmp_path, defense="weights", **step, per_device_train_batch_size=16)
    plain.defenses[0].coef = 0.0
    expected = first_gradients(plain)
    name = next(name for name in expected if "embed_tokens" in name)
    expected[name] = expected[name] + 3.0 * 2 * weight / weight.numel()
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("more", [{}, {"packing": True}, {"streaming": True}], ids=str)
def test_numbers_of_tokens_reach_the_batch_beside_them(tmp_path, truncation_mode, more):
    rows = make_rows()
    if more.pop("streaming", False):
        rows = rows.to_iterable_dataset()
    options = {"defense": "numbered", "max_length": 48, "truncation_mode": truncation_mode, "max_steps": 4, **more}
    trainer = make_trainer(tmp_path, rows=rows, **options)
    trainer.train()
    assert trainer.defenses[0].tokens > 0


# ---- what a run asks of any defense ----


def make_switched(folder, config_class=SwitchedConfig, rows=None, pool=None, **options):
    given = vars(config(folder, max_steps=2, save_strategy="steps", save_steps=1))
    names = ("max_steps", "save_strategy", "save_steps", "per_device_train_batch_size", "learning_rate", "max_length")
    switches = {"bf16": False, "activation_checkpointing": False, "use_cpu": True, "report_to": [], "logging_steps": 1}
    args = {"defense": "switched", **{name: given[name] for name in names}, **switches, **options}
    return EMGuardTrainer(
        make_model(),
        config_class(str(folder), **args),
        train_dataset=make_rows() if rows is None else rows,
        interleave_dataset=pool,
        processing_class=make_tokenizer(),
        peft_config=lora(),
    )


def test_every_hook_is_overridden_above():
    hooks = {name for name in vars(Defense) if not name.startswith("_")}
    overridden = {name for defense in OWN for name in vars(defense)}
    assert hooks - overridden == {"papers", "given", "own_loss", "surrounds_policy"}


def make_prepended(folder, **options):
    rows = make_rows().add_column("size", list(range(16))).to_iterable_dataset()
    given = {"defense": "kl,prepended", "pool": make_rows(3), **options}
    return make_switched(folder, PrependedConfig, rows, **given)


def test_rows_before_a_stream_a_column_and_a_pass_of_its_own(tmp_path):
    trainer = make_prepended(tmp_path)
    trainer.train()
    own, plain = trainer.defenses[1], make_prepended(tmp_path / "plain", prepended_scale=1.0)
    plain.train()
    assert "meets ['kl']" in HOOKS
    assert own.sizes == [[-1, -1, -1, 0], [1, 2, 3, 4]]
    assert logged(trainer, "prepended_rows") == [3, 0]
    assert own.passes == 2
    assert not trainer.model.get_input_embeddings()._forward_hooks
    assert logged(trainer)[0] != logged(plain)[0]


def test_a_value_that_is_left_open_is_the_checkpoints(tmp_path):
    whole = make_prepended(tmp_path, prepended_scale=0.25)
    whole.train()
    file = tmp_path / "checkpoint-1" / "defense.json"
    file.write_text(file.read_text().replace('"scale"', '"ratio"'))
    file.with_name("manifest.json").unlink()
    again = make_prepended(tmp_path)
    again.train(resume_from_checkpoint=str(file.parent))
    assert again.defenses[1].scale == 0.25
    assert logged(again) == logged(whole)
    with pytest.raises(ValueError, match=r"ratio=0\.5"):
        make_prepended(tmp_path, prepended_scale=0.5).train(resume_from_checkpoint=str(file.parent))


@pytest.mark.parametrize("more", [{"prepended_on": False}, {"pool": None}], ids=str)
def test_it_says_itself_that_it_is_off(tmp_path, more):
    trainer = make_prepended(tmp_path, **more)
    assert [defense.name for defense in trainer.defenses] == ["kl"]
    assert any("defense 'prepended' is off" in line for line in trainer.describe())


def test_the_plan_says_which_tokens_it_marks(tmp_path):
    about = planned(make_prepended(tmp_path))
    assert about["defense"][-1] == "3 rows come first."
    assert "prepended" not in about  # a stream's tokens are not counted
    rows = make_rows().add_column("size", list(range(16)))
    trainer = make_switched(tmp_path, PrependedConfig, rows, make_rows(3), defense="prepended")
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    assert planned(trainer)["prepended"] == [f"{tokens} tokens in the rows are marked 'sized'"]


def test_a_batch_is_read_once(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="drawn", max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.defenses[0].batches == 6
    losses, ces, distances = (logged(trainer, key) for key in ("loss", "loss_ce", "drawn"))
    assert distances[-1] > 1e-3
    for loss, ce, distance in zip(losses, ces, distances, strict=True):
        assert loss - ce == pytest.approx(10 * distance, rel=1e-3, abs=1e-5)


def test_its_switch_switches_it_off_without_a_term(tmp_path):
    off = make_switched(tmp_path / "off", noise=0.0)
    plain = make_switched(tmp_path / "plain", defense="none")
    assert off.defenses == []
    assert off.train_dataset.to_list() == plain.train_dataset.to_list()
    assert "defense 'switched' is off" in off.describe()[0]
    assert len(make_switched(tmp_path / "on").train_dataset) == 8


def test_options_that_are_only_declared_are_recorded_and_compared(tmp_path):
    trainer = make_switched(tmp_path)
    trainer.train()
    assert record(trainer)["defenses"] == {"switched": {"noise": 1.0, "places": [1, 2]}}
    make_switched(tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"noise=1\.0.*this run has.*noise=2\.0"):
        make_switched(tmp_path, noise=2.0).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("hook", ["options", "evidence"])
def test_what_no_checkpoint_can_record_is_refused_before_the_first_step(tmp_path, monkeypatch, hook):
    monkeypatch.setattr(Switched, hook, lambda self: {"size": torch.ones(1)})
    trainer = make_switched(tmp_path)
    with pytest.raises(ValueError, match=rf"defense 'switched': {hook}\(\) returned .*a checkpoint cannot record it"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_count_with_the_name_of_a_sum_of_the_term_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Drawn, "tokens", "loss")
    monkeypatch.setattr(Drawn, "read_batch", lambda self, batch: Marks(counts={"positions": 1}))
    with pytest.raises(ValueError, match="defense 'drawn': read_batch returned a count named 'positions'"):
        make_trainer(tmp_path, peft=lora(), defense="drawn").train()


def test_a_distance_without_a_gradient_at_the_start_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Drawn, "token_loss", lambda self, p, r: (p[0] - r[0]).square().sum(-1).sqrt())
    with pytest.raises(FloatingPointError, match="defense 'drawn': its distance is finite, and the gradient"):
        make_trainer(tmp_path, peft=lora(), defense="drawn").train()


@pytest.mark.parametrize("attribute", ["tokens", "mean_over"])
def test_an_unknown_scope_is_refused_before_training(tmp_path, monkeypatch, attribute):
    monkeypatch.setattr(Drawn, attribute, "labels")
    with pytest.raises(
        ValueError, match=f"{attribute}='labels' is no scope of this run, which has 'loss', 'all', 'drawn'"
    ):
        make_trainer(tmp_path, peft=lora(), defense="drawn")


def test_a_class_that_is_defined_again_takes_the_place_of_the_older_one():
    again = type("Drawn", (Drawn,), {"__module__": Drawn.__module__, "__qualname__": Drawn.__qualname__})
    assert register(again) is DEFENSES["drawn"] is again
    with pytest.raises(ValueError, match="'drawn' is taken by Drawn"):
        register(type("Other", (Drawn,), {}))


@pytest.mark.parametrize("others", ["", ",kl"])
def test_the_policys_pass_is_told_the_marks(tmp_path, others):
    """SFTTrainer computes the loss without a term, and this package with one."""
    trainer = make(tmp_path, defense=f"watching{others}", save_strategy="no")
    trainer.train()
    (watching,) = [defense for defense in trainer.defenses if defense.name == "watching"]
    assert watching.seen == [True] * 4
