"""Test `WholeCheckpoints` with trainers that know nothing of this package."""

import json
import os

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tiny import config, logged, make_model, make_rows, make_tokenizer
from torch.distributed.fsdp import StateDictType
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import SFTConfig, SFTTrainer

from trl_emguard.checkpoints import whole
from trl_emguard.checkpoints.manifest import find_flaw
from trl_emguard.checkpoints.resume import is_of_earlier_run, mark_earlier_runs, newest_whole_checkpoint
from trl_emguard.checkpoints.whole import WholeCheckpoints


class PlainTrainer(WholeCheckpoints, Trainer):
    pass


class PlainSFTTrainer(WholeCheckpoints, SFTTrainer):
    pass


def arguments(output_dir, **options):
    """Return TRL's own arguments, with the values of the other tests."""
    ours = config(output_dir, **{"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **options})
    names = ("output_dir", "save_strategy", "save_steps", "max_steps", "save_total_limit", "learning_rate", "bf16")
    more = ("per_device_train_batch_size", "logging_steps", "activation_checkpointing", "use_cpu", "report_to")
    rest = ("disable_tqdm", "max_length", "enable_jit_checkpoint")
    return SFTConfig(**{name: getattr(ours, name) for name in (*names, *more, *rest)})


def make_plain(trainer_class, output_dir, **options):
    args = arguments(output_dir, lr_scheduler_type="constant", **options)
    if trainer_class is PlainSFTTrainer:
        return PlainSFTTrainer(make_model(), args, train_dataset=make_rows(), processing_class=make_tokenizer())
    rows = [{"input_ids": torch.arange(3, 9) + i, "labels": torch.arange(3, 9) + i} for i in range(16)]
    return PlainTrainer(make_model(), args, train_dataset=rows)


trainers = pytest.mark.parametrize("trainer_class", [PlainTrainer, PlainSFTTrainer])


@trainers
def test_an_interrupted_run_resumes_from_the_newest_whole_checkpoint(tmp_path, trainer_class):
    first = make_plain(trainer_class, tmp_path)
    first.train()
    assert newest_whole_checkpoint(tmp_path) == (4, {})
    assert first.has_whole_checkpoint()
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert not first.has_whole_checkpoint()

    again = make_plain(trainer_class, tmp_path)
    folder = again.find_checkpoint(True)
    assert folder == str(tmp_path / "checkpoint-2")
    again.train(resume_from_checkpoint=folder)
    assert find_flaw(tmp_path / "checkpoint-4") is None
    assert logged(again) == logged(first)
    for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)


@trainers
def test_a_model_is_saved_whole_where_checkpoints_are_shards(tmp_path, monkeypatch, trainer_class):
    """Show the trainer a plugin of FSDP2 alone: one process shards nothing, and Trainer asks only for the type."""
    trainer = make_plain(trainer_class, tmp_path)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    trainer.is_fsdp_enabled = True
    trainer.save_model()
    trainer.save_model(str(tmp_path / "checkpoint-0"), _internal_call=True)
    saved, trained = load_file(tmp_path / "model.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in saved.items())
    assert not (tmp_path / "checkpoint-0" / "model.safetensors").exists()
    assert plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT


@trainers
def test_a_finished_run_makes_no_further_step(tmp_path, trainer_class):
    make_plain(trainer_class, tmp_path, max_steps=3, save_steps=3).train()
    again = make_plain(trainer_class, tmp_path, max_steps=3, save_steps=3)
    again.train(resume_from_checkpoint=again.find_checkpoint("true"))
    assert again.state.global_step == 3


def test_a_corrupt_checkpoint_is_refused_by_name(tmp_path):
    trainer = make_plain(PlainTrainer, tmp_path)
    trainer.train()
    (tmp_path / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"is a corrupt checkpoint \(scheduler.pt is missing\)"):
        trainer.find_checkpoint(str(tmp_path / "checkpoint-4"))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        trainer.find_checkpoint(str(tmp_path / "checkpoint-9"))


def test_older_checkpoints_are_deleted_and_the_limit_is_saved(tmp_path):
    trainer = make_plain(PlainTrainer, tmp_path, save_total_limit=1)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    stored = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert stored.save_total_limit == trainer.args.save_total_limit == 1


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_checkpoints_of_an_earlier_run_are_passed_over(tmp_path, capsys):
    def make(stop=None, **options):
        trainer = make_plain(PlainTrainer, tmp_path, max_steps=6, **options)
        trainer.add_callback(StopAt(stop))
        return trainer

    make().train()
    make(stop=3).train()
    again = make(stop=5)
    assert again.find_checkpoint(True) == str(tmp_path / "checkpoint-2")
    assert list(newest_whole_checkpoint(tmp_path)[1]) == ["checkpoint-6", "checkpoint-4"]
    # A run that saved nothing leaves none of its own. An earlier one may still be named, and then the run is that one.
    make(stop=1).train()
    with pytest.raises(ValueError, match=r"checkpoint-6 \(it is of an earlier run in this folder; name it to resume"):
        again.find_checkpoint(True)
    named = again.find_checkpoint(str(tmp_path / "checkpoint-4"))
    again.train(resume_from_checkpoint=named)
    assert again.state.global_step == 5
    assert f"trl_emguard: resumes from {named}." in capsys.readouterr().out
    assert again.find_checkpoint(True) == named


def test_a_mark_leaves_the_order_in_which_checkpoints_are_deleted(tmp_path):
    trainer = make_plain(PlainTrainer, tmp_path)
    trainer.train()
    os.utime(tmp_path / "checkpoint-4", (1, 1))
    mark_earlier_runs(tmp_path, 2)
    assert (tmp_path / "checkpoint-4").stat().st_mtime == 1
    assert [is_of_earlier_run(tmp_path / f"checkpoint-{step}") for step in (2, 4)] == [False, True]
    assert find_flaw(tmp_path / "checkpoint-4") is None
    assert not trainer.has_whole_checkpoint()  # a run at step 4 has to write its own


class Watcher(TrainerCallback):
    """Ask for a checkpoint at step 2, as a SIGTERM does, in one event; note the step and own steps of each save."""

    def __init__(self, event):
        self.steps, self.saved = 0, []
        setattr(self, event, self.ask)

    def ask(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.jit.jit_manager.is_checkpoint_requested = True

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def save_into(self, folder, state, model):
        self.saved.append((state.global_step, self.steps))


# At `on_optimizer_step` the third step is being made; at `on_save` the second has been saved.
@pytest.mark.parametrize(("event", "saved"), [("on_optimizer_step", [(2, 2), (3, 3)]), ("on_save", [(2, 2)])])
def test_a_checkpoint_after_a_sigterm_is_written_once_and_after_the_callbacks(tmp_path, event, saved):
    trainer, watcher = make_plain(PlainTrainer, tmp_path, enable_jit_checkpoint=True), Watcher(event)
    watcher.jit = next(c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    trainer.add_callback(watcher)
    trainer.train()
    assert watcher.saved == saved
    assert newest_whole_checkpoint(tmp_path) == (saved[-1][0], {})


@pytest.mark.parametrize("unit", ["steps", "epoch"])
def test_an_evaluation_after_the_checkpoint_of_a_sigterm_may_find_it_the_best(tmp_path, unit):
    """Trainer asks for no second checkpoint in the unit "steps", and for one in the unit "epoch"."""
    trainer, watcher = make_plain(PlainTrainer, tmp_path, enable_jit_checkpoint=True), Watcher("on_optimizer_step")
    trainer.args.save_strategy, trainer.args.eval_strategy = SaveStrategy(unit), IntervalStrategy(unit)
    trainer.args.save_steps = trainer.args.eval_steps = trainer.state.save_steps = 1
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "loss"
    trainer.args.greater_is_better, trainer.eval_dataset = False, trainer.train_dataset
    watcher.jit = next(c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    trainer.add_callback(watcher)
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_model_checkpoint == str(folder)
    assert json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"] == str(folder)
    assert find_flaw(folder) is None
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in trainer.model.named_parameters() if name in saved)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), OSError),
        (RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos"), OSError),
        (RuntimeError("out of memory"), RuntimeError),
    ],
)
def test_a_full_disk_is_named(tmp_path, monkeypatch, error, expected):
    def fail(folder):
        raise error

    monkeypatch.setattr(whole, "finish_checkpoint", fail)
    trainer = make_plain(PlainTrainer, tmp_path, save_total_limit=1)
    with pytest.raises(expected, match="GiB are free there" if expected is OSError else "out of memory"):
        trainer.train()
    assert trainer.args.save_total_limit == 1
    assert find_flaw(tmp_path / "checkpoint-2") == "it was never finished"
