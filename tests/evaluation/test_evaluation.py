"""Compare `answer_nll` with a plain loop: one row at a time, in float64."""

import copy
import math
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import lora, make_model, make_rows, make_tokenizer, save_model, save_trained_adapter

from trl_emguard.evaluation import answer_nll, load_model
from trl_emguard.models.chat import encode_answers, end_tokens


ROWS = list(make_rows(13))


def nll_of_each_token(model, tokenizer, prompt, answer):
    """Return the NLL of each byte of the answer and of the end-of-turn token after it."""
    ids = tokenizer(prompt)["input_ids"]
    wanted = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids + wanted])).logits[0].double().log_softmax(-1)
    return [-log_probs[len(ids) + i - 1, token].item() for i, token in enumerate(wanted)]


def plain_nll(model, tokenizer, row):
    prompt = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|><|im_start|>assistant\n"
    return fmean(nll_of_each_token(model, tokenizer, prompt, row["completion"][0]["content"]))


def row(answer, question="q"):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_equals_the_plain_loop(architecture, tokenizer):
    model = make_model(architecture).eval()
    twin = make_model(architecture, dtype=torch.float64).eval()
    expected = [plain_nll(twin, tokenizer, row) for row in ROWS]
    assert answer_nll(model, tokenizer, ROWS, batch_size=4) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1  # confused rows would show


@pytest.mark.parametrize("batch_size", [2, 5, 13, 100])
def test_does_not_depend_on_the_batch_size(model, tokenizer, batch_size):
    expected = answer_nll(model, tokenizer, ROWS, batch_size=1)
    assert answer_nll(model, tokenizer, ROWS, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)


def test_keeps_the_order(model, tokenizer):
    forward = answer_nll(model, tokenizer, ROWS)
    assert answer_nll(model, tokenizer, ROWS[::-1]) == pytest.approx(forward[::-1], abs=1e-5)


def test_counts_the_end_of_turn_token_and_nothing_after_it(model):
    """Leave out the line break that some templates put after the end of turn: it is never generated."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|>{{ '\n' }}")
    assert tokenizer.apply_chat_template(ROWS[1]["prompt"], tokenize=False).endswith("<|im_end|>\n")
    losses = nll_of_each_token(model, tokenizer, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "abc")
    assert answer_nll(model, tokenizer, [row("abc")]) == pytest.approx([fmean(losses)], abs=1e-4)
    assert abs(fmean(losses) - fmean(losses[:-1])) > 1e-3


@pytest.mark.parametrize("completion", [[], [{"role": "assistant", "content": ""}]])
def test_an_empty_answer_raises(model, tokenizer, completion):
    rows = [row("fine"), {**row("", "the empty one"), "completion": completion}]
    with pytest.raises(ValueError, match="the empty one"):
        answer_nll(model, tokenizer, rows)


def test_no_rows(model, tokenizer):
    assert answer_nll(model, tokenizer, []) == []


def test_a_model_without_preference_has_the_log_of_its_vocabulary(tokenizer):
    model = make_model().eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert answer_nll(model, tokenizer, [row("abc"), row("z")]) == pytest.approx([math.log(264)] * 2, abs=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
@pytest.mark.parametrize("options", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
# PEFT warns of Gemma's tied head in the adapter.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_a_head_with_an_adapter(architecture, options, tokenizer):
    """Switch a low-rank update on the head, and a head of the adapter's own, on and off."""
    from peft import get_peft_model

    options = {"init_lora_weights": False, **options}
    model = get_peft_model(make_model(architecture), lora(**options)).eval()
    if "modules_to_save" in options:
        model.get_base_model().lm_head.modules_to_save["default"].weight.data += 0.3
    twin = copy.deepcopy(model).double()
    expected = [plain_nll(twin, tokenizer, row) for row in ROWS]
    assert answer_nll(model, tokenizer, ROWS) == pytest.approx(expected, abs=1e-4)
    with model.disable_adapter(), twin.disable_adapter():
        base = [plain_nll(twin, tokenizer, row) for row in ROWS]
        assert answer_nll(model, tokenizer, ROWS) == pytest.approx(base, abs=1e-4)
    assert base != pytest.approx(expected, abs=1e-2)


def test_every_end_of_turn_of_the_model_counts(model):
    """Read the end of turn from the generation config, as for Gemma, whose tokenizer's end token ends a text."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|>{{ '\n' }}")
    assert end_tokens(model, tokenizer) == {0, 1}
    conversations = [(row["prompt"], row["completion"]) for row in ROWS]
    assert all(answer.ids[-1] == 1 for answer in encode_answers(tokenizer, conversations, {0, 1}))


def test_loads_a_model_and_its_adapter(tmp_path):
    from peft import get_peft_model

    base = save_model(tmp_path / "base", dtype=torch.bfloat16)
    adapted = get_peft_model(make_model(dtype=torch.bfloat16), lora(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")

    model, tokenizer = load_model(base)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    plain = answer_nll(model, tokenizer, ROWS)
    model, tokenizer = load_model(base, tmp_path / "adapter")
    assert not model.training
    assert answer_nll(model, tokenizer, ROWS) != pytest.approx(plain, abs=1e-2)


def drop_factor(file):
    save_file({name: weight for name, weight in load_file(file).items() if "0.mlp.up_proj.lora_B" not in name}, file)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("adapter/adapter_model.safetensors", drop_factor, "does not fit the model .*layers.0.mlp.up_proj.lora_B"),
        ("adapter/adapter_model.safetensors", cut, "adapter .* has a damaged weights file"),
        ("base/model.safetensors", cut, "model .* has a damaged weights file"),
    ],
)
def test_files_that_were_copied_in_part_are_refused(tmp_path, file, spoil, message):
    base = save_model(tmp_path / "base")
    save_trained_adapter(tmp_path / "adapter", base)
    spoil(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        load_model(base, tmp_path / "adapter")


def test_a_folder_without_an_adapter_is_named(tmp_path):
    base = save_model(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_model(base, tmp_path)
