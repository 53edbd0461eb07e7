"""Test the identity of a model. It is stored in files, so its values are fixed; and every weight counts."""

import hashlib

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from tiny import lora, make_model
from transformers import GPT2Config, GPT2LMHeadModel

from trl_emguard.models.identity import adapter_scales, fingerprint, weight_checksums


def plain_fingerprint(model):
    """Compute the fingerprint of version 0.1.0, whose records must stay readable."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].contiguous()
        digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fingerprint_is_that_of_old_records(dtype):
    for model in (make_model("gpt_neox", dtype), make_model("gemma2", dtype), make_gpt2(dtype)):
        assert fingerprint(model) == plain_fingerprint(model)


def make_gpt2(dtype):
    """Return a tiny GPT-2, whose layers have buffers of booleans."""
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes)).to(dtype)


# PEFT warns of a name that is a part of `lora_`. This test is about such names.
@pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained:UserWarning")
def test_adapters_are_left_out_of_a_fingerprint_by_name():
    model = get_peft_model(make_model(), lora(init_lora_weights=False), adapter_name="a")
    before = fingerprint(model, {"b"})
    model.add_adapter("b", lora(init_lora_weights=False))
    assert fingerprint(model, {"b"}) == before
    assert len({fingerprint(model), before, fingerprint(model, {"a"}), fingerprint(model, {"a", "b"})}) == 4


def test_trained_tokens_have_no_scaling_factors():
    scales = [adapter_scales(get_peft_model(make_model("qwen2"), lora(**o)), "default")
              for o in ({}, {"trainable_token_indices": [3]})]  # fmt: skip
    assert scales[0] == scales[1]


def test_every_weight_changes_the_fingerprint():
    model = make_model()
    found = {fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(1)
        found.add(fingerprint(model))
    assert len(found) == 1 + len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_packed_weights_in_buffers_change_the_fingerprint(dtype):
    """AWQ and GPTQ layers keep their weights in buffers of integers."""
    found = set()
    for value in range(2):
        model = make_model()
        model.model.layers[0].register_buffer("qweight", torch.full((8, 8), value, dtype=dtype))
        found.add(fingerprint(model))
    assert len(found | {fingerprint(make_model())}) == 3


@pytest.mark.parametrize(("init", "is_whole"), [("gaussian", True), ("orthogonal", True), ("pissa_niter_2", False)])
def test_checksums_under_adapters(init, is_whole):
    """Leave out the weights under adapters only if the adapters' initialisation changes them."""
    whole = weight_checksums(make_model())
    found = weight_checksums(get_peft_model(make_model(), lora(init_lora_weights=init)).get_base_model())
    under = {name for name in whole if "_proj" in name}
    assert found == {name: checksum for name, checksum in whole.items() if is_whole or name not in under}


def test_an_offloaded_model_has_no_fingerprint():
    model = make_model()
    cpu_offload(model.model.layers[1], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"does not fit on the device.*bfloat16.*--rejudge"):
        fingerprint(model)


def test_checksums_of_a_shape_that_grew():
    small = make_model().lm_head
    large = torch.nn.Linear(32, 300, bias=False)
    with torch.no_grad():
        large.weight[:264] = small.weight
    assert weight_checksums(large) == weight_checksums(small)
