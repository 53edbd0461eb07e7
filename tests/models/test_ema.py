"""The average of a run's weights: its values, its file, resumption, and a training that it does not change."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import config, lora, make_model, make_rows, make_tokenizer, make_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTTrainer

from trl_emguard import DriftCallback, EMACallback
from trl_emguard.checkpoints.manifest import find_flaw


class Weights(TrainerCallback):
    """Keeps the trained weights after each step, those of the start first."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps = []
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad})


def train(folder, callbacks, resume=None, peft=True, **options):
    trainer = make_trainer(folder, peft=lora() if peft else None, max_steps=6, **options)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.995])
@pytest.mark.parametrize("defense", ["none", "kl"])
def test_the_average_is_that_of_the_definition(tmp_path, decay, defense):
    seen, ema = Weights(), EMACallback(decay)
    train(tmp_path, [seen, ema], defense=defense)
    expected = seen.steps[0]
    for t, weights in enumerate(seen.steps[1:], start=1):
        d = min(decay, (1 + t) / (10 + t))
        expected = {name: d * expected[name] + (1 - d) * weights[name] for name in weights}
    assert ema.average.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name].double(), value, rtol=1e-5, atol=1e-6)
    moved = any((ema.average[name] - seen.steps[-1][name]).abs().max() > 1e-4 for name in expected)
    assert moved == (decay > 0)


def test_training_is_the_same_bit_for_bit(tmp_path):
    with_ema, without = Weights(), Weights()
    one = train(tmp_path / "a", [with_ema, EMACallback()])
    two = train(tmp_path / "b", [without])
    for a, b in zip(with_ema.steps, without.steps, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    drop = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    logs = [[{k: v for k, v in e.items() if k not in drop} for e in t.state.log_history] for t in (one, two)]
    assert logs[0] == logs[1]


def test_the_saved_adapter_holds_the_average(tmp_path):
    ema = EMACallback()
    trainer = train(tmp_path, [ema])
    final = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loaded = dict(PeftModel.from_pretrained(make_model(), str(tmp_path / "ema")).named_parameters())
    assert ema.average
    for name, value in ema.average.items():
        assert torch.equal(loaded[name], value)
        assert not torch.equal(loaded[name], final[name])


def test_full_fine_tuning_with_tied_weights(tmp_path):
    ema = EMACallback()
    train(tmp_path, [ema], peft=False)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "ema").named_parameters())
    assert loaded.keys() == ema.average.keys()
    assert all(torch.equal(loaded[name], value) for name, value in ema.average.items())
    assert (tmp_path / "ema" / "tokenizer.json").is_file()


def test_bf16_weights_have_an_average_in_fp32(tmp_path):
    ema = EMACallback(0.9)
    train(tmp_path, [ema], peft=False, model=make_model(dtype=torch.bfloat16))
    assert all(value.dtype == torch.float32 for value in ema.average.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in ema.average.values())
    saved = load_file(tmp_path / "ema" / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in saved.values())


SAVES = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("place", ["out/checkpoint-3", "backup/checkpoint-3", "out/last-checkpoint"])
def test_a_resumed_run_gives_the_same_average(tmp_path, place):
    whole, resumed = EMACallback(), EMACallback()
    train(tmp_path / "out", [whole], **SAVES)
    (tmp_path / "backup").mkdir()
    (tmp_path / "out/checkpoint-3").rename(tmp_path / place)
    train(tmp_path / ("new" if "backup" in place else "out"), [resumed], str(tmp_path / place), **SAVES)
    assert all(torch.equal(resumed.average[name], value) for name, value in whole.average.items())


def test_stock_trainers_save_and_resume_the_average(tmp_path):
    def run(resume=None):
        ema, rows, tokenizer = EMACallback(), make_rows(), make_tokenizer()
        args = config(tmp_path, max_steps=6, **SAVES)
        trainer = SFTTrainer(make_model(), args, train_dataset=rows, processing_class=tokenizer, callbacks=[ema])
        trainer.train(resume_from_checkpoint=resume)
        return ema.average

    whole, resumed = run(), run(str(tmp_path / "checkpoint-3"))
    assert whole
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


class Killed(TrainerCallback):
    """Ends a run once a checkpoint is marked as whole, before other callbacks hear of it."""

    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("make_callback", [EMACallback, lambda: DriftCallback(every=2, limit=2, budget=1e9)])
def test_a_checkpoint_that_is_whole_has_the_callbacks_state(tmp_path, make_callback):
    options = {"save_total_limit": 1, **SAVES}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [Killed(), make_callback()], **options)
    trainer = train(tmp_path, [make_callback()], True, **options)
    assert trainer.state.global_step == 6
    assert find_flaw(tmp_path / "checkpoint-6") is None


@pytest.mark.parametrize("fault", ["missing", "foreign", "damaged", "decay"])
def test_a_checkpoint_without_this_average_is_refused(tmp_path, fault):
    train(tmp_path, [EMACallback()], **SAVES)
    path, decay, message = tmp_path / "checkpoint-3" / "ema.safetensors", 0.995, "holds no ema.safetensors"
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()  # it would find most damage by itself
    shutil.rmtree(tmp_path / "ema")
    if fault == "missing":
        path.unlink()
    elif fault == "foreign":  # of the same names and shapes, and of other weights
        shutil.copyfile(tmp_path / "checkpoint-6" / "ema.safetensors", path)
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:100])
        message = "is damaged"
    else:
        decay, message = 0.5, "was averaged with decay=0.995"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, [EMACallback(decay)], str(tmp_path / "checkpoint-3"), **SAVES)
    assert not (tmp_path / "ema").exists()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        EMACallback(decay)


@pytest.fixture
def mesh():
    """Return a mesh of two ranks, of which only this one is there."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["DeepSpeed ZeRO-3", "FSDP", "tensor parallelism"])
@pytest.mark.parametrize("hook", ["on_init_end", "on_train_begin"])
@pytest.mark.parametrize("callback", [EMACallback, DriftCallback])
def test_sharded_weights_are_refused(engine, hook, callback, mesh):
    model = make_model()
    if engine == "tensor parallelism":
        norm = model.model.norm
        norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.data, mesh, [Shard(0)]))
    elif engine == "FSDP":
        block = model.model.layers[0]
        block.__class__ = type("Sharded", (FSDPModule, type(block)), {})
    else:
        next(model.parameters()).ds_status = "NOT_AVAILABLE"
    with pytest.raises(ValueError, match=f"{callback.__name__} does not work under {engine}"):
        getattr(callback(), hook)(None, None, None, model=model)
