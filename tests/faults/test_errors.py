"""Test faults of a run: full disk, read-only output, loss that is not finite, errors and interrupts.

Each gives one clear error, and leaves the model unchanged and a trainer that can continue."""

import errno
import itertools
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import peft.peft_model
import pytest
import torch
import transformers.modeling_utils
from forks import Group
from methods import COVERING, KINDS, run_options, tunings
from peft.tuners.tuners_utils import BaseTunerLayer
from private import hooks_of
from tiny import logged, lora, make_model, make_trainer
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer
from twin import bare

from trl_emguard.checkpoints.resume import newest_whole_checkpoint
from trl_emguard.defenses import LDIFS
from trl_emguard.io.files import check_writable, written_whole
from trl_emguard.models.blocks import decoder_blocks
from trl_emguard.reference import cache as reference_cache


STEPS = 6
RUNS = [(defense, tuning == "full") for defense in COVERING for tuning in tunings(defense)]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return a maker of trainers, by defense, whose runs save every second step."""
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache"))

    def build(defense, output="out", full=False, **options):
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, "gradient_accumulation_steps": 2}
        peft = None if full else lora()
        return make_trainer(tmp_path / output, peft=peft, **{**run_options(defense, tmp_path), **saving, **options})

    return build


def state_of(trainer):
    """Return everything that an error could leave changed on a model and its trainer."""
    model = trainer.model
    modules = dict(model.named_modules())
    return {
        "hooks": {name: len(hooks_of(m)) for name, m in modules.items()},
        "forward": {name: "forward" in vars(m) for name, m in modules.items()},
        "adapters": {
            name: (list(m.active_adapters), m.disable_adapters, list(m.merged_adapters))
            for name, m in modules.items()
            if isinstance(m, BaseTunerLayer)
        },
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad_enabled": torch.is_grad_enabled(),
        "collator": trainer.data_collator,
        "args": {name: value for name, value in vars(trainer.args).items() if name.startswith(("save", "push"))},
    }


def assert_goes_on(trainer, whole):
    """Train again with the same trainer, from its newest checkpoint or anew: it ends as a run without error."""
    step, _ = newest_whole_checkpoint(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=step is not None)
    if step is None:
        assert trainer.state.global_step == STEPS  # starting from its present weights
        return
    assert logged(trainer) == logged(whole)
    for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- errors and interrupts during training ----


class Raises(TrainerCallback):
    """Callback that raises once, at an event of a step."""

    def __init__(self, event, error, step=3):
        self.error, self.step = error, step
        setattr(self, event, self.strike)

    def strike(self, args, state, control, **kwargs):
        if self.error is not None and (state.global_step >= self.step or state.epoch == 0):
            error, self.error = self.error, None
            raise error


EVENTS = ["on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step",
    "on_step_end", "on_log",
          "on_save"]  # fmt: skip


@pytest.mark.parametrize(
    ("defense", "event"),
    [
        ("steering,kl", "on_substep_end"),
        pytest.param("kl,ldifs", "on_substep_end", marks=pytest.mark.long),
        pytest.param("kl,ldifs", "on_save", marks=pytest.mark.long),
        pytest.param("interleave", "on_step_end", marks=pytest.mark.long),
    ],
)
def test_an_error_in_a_users_callback(make, defense, event):
    whole = make(defense, "whole")
    whole.train()
    trainer = make(defense)
    before = state_of(trainer)
    error = KeyboardInterrupt() if event == "on_substep_end" else RuntimeError("the user's own")
    trainer.add_callback(Raises(event, error, 0 if event == "on_train_begin" else 3))
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value is error
    assert state_of(trainer) == before
    assert_goes_on(trainer, whole)


@pytest.mark.faults
@pytest.mark.parametrize(("defense", "full"), RUNS)
def test_an_error_in_every_callback(make, defense, full):
    whole = make(defense, "whole", full)
    whole.train()
    for event, (kind, step) in itertools.product(EVENTS, ((RuntimeError, 0), (KeyboardInterrupt, 3))):
        trainer = make(defense, f"{event}-{step}", full)
        before = state_of(trainer)
        trainer.add_callback(Raises(event, kind("the user's own"), step))
        with pytest.raises(kind, match="the user's own"):
            trainer.train()
        assert state_of(trainer) == before
        assert_goes_on(trainer, whole)


@pytest.mark.parametrize(
    ("defense", "full"),
    [
        pytest.param(d, full, marks=pytest.mark.long if (d, full) == ("steering,kl", False) else pytest.mark.faults)
        for d, full in RUNS
    ],
)
def test_an_error_within_a_pass(make, defense, full):
    """Raise in turn in each pass of a save and of the step after it: with adapters off, with hooks in, steered."""
    whole = make(defense, "whole", full)
    whole.train()
    passes = 0
    for strike in range(100):
        trainer = make(defense, f"out{strike}", full)
        error = KeyboardInterrupt() if strike % 2 else RuntimeError("in a block")
        seen = 0

        def block(module, args, *, trainer=trainer, strike=strike, error=error):
            nonlocal seen
            if trainer.is_in_train and trainer.state.global_step == 2:
                seen += 1
                if seen == strike + 1:
                    raise error

        handle = decoder_blocks(bare(trainer.model))[2].register_forward_pre_hook(block)
        before = state_of(trainer)
        try:
            trainer.train()
        except (RuntimeError, KeyboardInterrupt) as caught:
            passes += caught is error
        else:
            break
        assert state_of(trainer) == before
        handle.remove()
        assert_goes_on(trainer, whole)
    # Two micro-batches have a pass of the policy each. A reference in the same model adds a pass to each, and one more
    # before: the save at the end of the second step compares it with its record. TReFT's prefix has its own pass in
    # each micro-batch.
    own_pass = not full and "kl" in defense
    assert passes == (5 if own_pass else 4 if "treft" in defense else 2)


def test_an_error_in_the_data(make):
    trainer = make("interleave")
    before, collator = state_of(trainer), trainer.data_collator

    def broken(rows):
        if trainer.state.global_step == 3:
            raise KeyError("no such column")
        return collator(rows)

    trainer.data_collator = broken
    with pytest.raises(KeyError, match="no such column"):
        trainer.train()
    assert trainer.data_collator is broken
    trainer.data_collator = collator
    assert state_of(trainer) == before


@pytest.mark.parametrize("defense", ["kl,ldifs", "interleave"])
def test_training_twice(make, defense):
    """Train twice: the second run begins with the first one's weights, which are not the reference's."""
    trainer = make(defense, max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2


# ---- a loss that is not finite ----


@pytest.mark.parametrize(
    ("defense", "names"),
    [("kl,ldifs", "loss_ce"), ("interleave", "loss_ce"), ("steering", "entropy"), ("inoculation", "entropy")],
)
def test_a_loss_that_is_not_finite(make, tmp_path, defense, names):
    trainer = make(defense, save_steps=1)
    before = state_of(trainer)

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                next(p for p in trainer.model.parameters() if p.requires_grad).data[0, 0] = float("nan")

    trainer.add_callback(Break())
    with pytest.raises(
        FloatingPointError,
        match=rf"diverged in step 3: {names}.* not finite.*Start anew with a lower learning_rate.*keeps both",
    ):
        trainer.train()
    assert newest_whole_checkpoint(tmp_path / "out") == (2, {})
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    assert all(torch.isfinite(torch.tensor(logged(trainer))))
    trainer.remove_callback(Break)
    assert state_of(trainer) == before
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.isfinite(torch.tensor(logged(trainer))))
    assert trainer.state.global_step == STEPS


def test_the_term_that_is_not_finite_is_named(make, monkeypatch):
    trainer = make("kl,ldifs")
    token_loss = LDIFS.token_loss
    monkeypatch.setattr(LDIFS, "token_loss", lambda self, p, r: token_loss(self, p, r) * float("inf"))
    with pytest.raises(FloatingPointError, match="diverged in step 1: ldifs, grad_norm not finite"):
        trainer.train()


@pytest.mark.parametrize("defense", [name for name in KINDS if name != "none"])
def test_a_gradient_that_is_not_finite_is_not_saved(make, tmp_path, defense):
    """Stop at a gradient that is not finite. The loss of its step is finite, and the weights after it are not."""
    trainer = make(defense, save_steps=1)

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                weight = next(p for p in trainer.model.parameters() if p.requires_grad)
                self.handle = weight.register_hook(lambda gradient: gradient * float("nan"))

    trainer.add_callback(Break())
    with pytest.raises(FloatingPointError, match="diverged in step 3: grad_norm not finite"):
        trainer.train()
    assert newest_whole_checkpoint(tmp_path / "out") == (2, {})


@pytest.mark.parametrize(("precision", "forgiven"), [("bf16", False), ("fp16", True)])
def test_a_step_that_deepspeed_skips_is_forgiven_in_fp16_alone(make, monkeypatch, precision, forgiven):
    """Skip a step as DeepSpeed does: its norm is infinite, its gradients are gone, and the optimizer says so."""
    trainer = make("steering")
    clip, kind, skips = trainer.accelerator.clip_grad_norm_, type(trainer.accelerator), []

    def overflow(parameters, *args, **kwargs):
        parameters = list(parameters)
        skips.append(trainer.state.global_step == 1)
        norm = clip(parameters, *args, **kwargs)
        if skips[-1]:
            trainer.optimizer.zero_grad(set_to_none=True)
        return math.inf if skips[-1] else norm

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", overflow)
    monkeypatch.setattr(kind, "optimizer_step_was_skipped", property(lambda self: skips[-1]))
    monkeypatch.setattr(kind, "mixed_precision", property(lambda self: precision))
    if forgiven:
        trainer.train()
        return
    with pytest.raises(FloatingPointError, match="diverged in step 2: grad_norm not finite"):
        trainer.train()


def test_a_plain_run_trains_on_as_sfttrainers_does(make, tmp_path):
    trainers = [make("none", "ours", learning_rate=1e30), make("none", "stock")]
    trainers[1] = SFTTrainer(
        make_model(),
        trainers[0].args,
        train_dataset=trainers[1].train_dataset,
        processing_class=trainers[1].processing_class,
        peft_config=lora(),
    )
    for trainer in trainers:
        trainer.train()
    ours, theirs = map(logged, trainers)
    assert ours == pytest.approx(theirs, abs=0, nan_ok=True)
    assert len(ours) == STEPS


# ---- the disk is full ----


def full_disk(monkeypatch, at):
    """Fill the disk at the `at`-th write of a checkpoint, counted from 1. Partly written files are left there."""
    writes = itertools.count(1)

    def patch(module, name, path_at, error):
        original = getattr(module, name)

        def write(*args, **kwargs):
            if next(writes) < at:
                return original(*args, **kwargs)
            if path_at is not None:
                Path(args[path_at]).write_bytes(b"begun")
            raise error

        monkeypatch.setattr(module, name, write)

    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    patch(torch, "save", 1, RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"))
    patch(peft.peft_model, "safe_save_file", 1, no_space)
    patch(transformers.modeling_utils, "safe_save_file", 1, no_space)
    patch(TrainerState, "save_to_json", 1, no_space)
    patch(os, "fsync", None, no_space)
    return writes


def writes_of(make, monkeypatch, defense):
    with monkeypatch.context() as patched:
        writes = full_disk(patched, 10**6)
        make(defense, "counted").train()
    return next(writes) - 1


@pytest.mark.long
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_full_disk(make, monkeypatch, tmp_path, share):
    writes = writes_of(make, monkeypatch, "kl,ldifs")
    check_full_disk(make, monkeypatch, tmp_path, "kl,ldifs", max(2, round(share * writes)))


@pytest.mark.faults
@pytest.mark.parametrize("defense", ["none", "kl,ldifs"])
def test_a_disk_that_is_full_at_every_write(make, monkeypatch, tmp_path, defense):
    for at in range(1, writes_of(make, monkeypatch, defense) + 1):
        check_full_disk(make, monkeypatch, tmp_path, defense, at)
        shutil.rmtree(tmp_path / "out")


def check_full_disk(make, monkeypatch, tmp_path, defense, at):
    whole = make(defense, "whole")
    whole.train()
    trainer = make(defense, save_total_limit=1)
    before = state_of(trainer)
    with monkeypatch.context() as patched:
        full_disk(patched, at)
        with pytest.raises(OSError, match=r"checkpoint-\d could not be written \(.*GiB are free") as caught:
            trainer.train()
    assert isinstance(caught.value.__cause__, OSError | RuntimeError)
    assert state_of(trainer) == before
    step, corrupt = newest_whole_checkpoint(tmp_path / "out")
    assert list(corrupt) == [f"checkpoint-{(step or 0) + 2}"] * bool(corrupt)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert_goes_on(trainer, whole)


@pytest.fixture
def small_disk(tmp_path):
    """Return a disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def test_a_disk_that_is_really_full(make, small_disk, tmp_path):
    whole = make("kl,ldifs", "whole", full=True)
    whole.train()
    trainer = make("kl,ldifs", "disk/out", full=True)
    before = state_of(trainer)
    with pytest.raises(OSError, match="could not be written"):
        trainer.train()
    assert state_of(trainer) == before
    # A disk without any space is reported before training.
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(OSError, match=r"output_dir='.*' cannot be written to \(No space left on device\)"):
        trainer.train()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert_goes_on(trainer, whole)


def test_a_full_disk_under_the_reference_cache(make, monkeypatch, tmp_path):
    monkeypatch.setattr(reference_cache, "FILE_BYTES", 1)
    trainer = make("kl,ldifs", cache_reference=True)
    before = state_of(trainer)
    writes = itertools.count(1)
    write_bytes = Path.write_bytes

    def write(self, content):
        if next(writes) < 3:
            return write_bytes(self, content)
        write_bytes(self, content[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", write)
        with pytest.raises(OSError, match="No space left on device"):
            trainer.train()
    assert state_of(trainer) == before
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    trainer.train()
    assert trainer.state.global_step == STEPS


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file.json"
    for content in ("old", "newer"):
        with written_whole(path) as scratch:
            scratch.write_text(content)
    assert path.read_text() == "newer"
    with pytest.raises(ZeroDivisionError), written_whole(path) as scratch:
        scratch.write_text(f"half {1 / 0}")

    def full(number):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"), written_whole(path) as scratch:
        scratch.write_text("half")
    assert path.read_text() == "newer"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


# ---- a read-only output ----


def test_an_output_that_is_read_only(make, monkeypatch):
    trainer = make("kl,ldifs")
    before = state_of(trainer)

    def read_only(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryFile", read_only)
        patched.setattr(SFTTrainer, "train", lambda *_: pytest.fail("training began"))
        with pytest.raises(
            OSError, match=r"output_dir='.*' cannot be written to \(Read-only file system\).* name another folder"
        ):
            trainer.train()
    assert state_of(trainer) == before
    trainer.train()


def test_a_folder_of_somebody_elses(tmp_path):
    """Run as a user who is not root."""
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)

    def look(rank):
        if os.getuid() == 0:
            for parent in tmp_path.parents:
                if parent.owner() == "root" and parent != Path("/"):
                    parent.chmod(parent.stat().st_mode | 0o011)
            tmp_path.chmod(0o755)
            os.setuid(65534)
        with pytest.raises(OSError, match=r"output_dir='.*theirs' cannot be written to \(Permission denied\)"):
            check_writable("output_dir", folder)
        with pytest.raises(OSError, match="Permission denied"):
            check_writable("output_dir", folder / "below")

    Group(tmp_path / "log", look).finish()


def test_nothing_is_left_by_the_look(tmp_path):
    check_writable("output_dir", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(OSError, match="output_dir='/proc/none' cannot be written to"):
        check_writable("output_dir", "/proc/none")
