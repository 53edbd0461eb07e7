"""Parts of the tests' runs: tiny random models of several architectures, a tokenizer, ragged rows, a trainer."""

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl.trainer.utils import create_model_from_path

from trl_emguard import EMGuardConfig, EMGuardTrainer
from trl_emguard.evidence import read_defense_file
from trl_emguard.models.blocks import decoder_blocks


SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Some templates (Qwen's) write nothing for a turn of another role.
STRICT = TEMPLATE.replace("in messages %}", "in messages if message['role'] in ('system', 'user', 'assistant') %}")
# Some templates (Mistral v0.3's) write a system turn only while a user turn is the last one.
UNANSWERED_SYSTEM = TEMPLATE.replace(
    "in messages %}", "in messages if message['role'] != 'system' or messages[-1]['role'] == 'user' %}"
)
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "eos_token_id": 1,
    "bos_token_id": None,
}
# Every layer's width is a multiple of 64, the block of a 4-bit weight: some CPUs pack no other.
QUANTISABLE = {"hidden_size": 128, "intermediate_size": 64}
ARCHITECTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    # Soft-capped logits, tight enough that the cap bends them.
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.5, "attn_implementation": "eager"},
    ),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"attention_dropout": 0.0}),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte. Pad and end of turn are the same token, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1], pad_token=SPECIAL[1])
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = TEMPLATE
    return fast


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random model, the same at every call. Its widely spread weights give distinct logits."""
    config_class, model_class, extra = ARCHITECTURES[architecture]
    torch.manual_seed(1)
    config = config_class(**{**SIZES, "initializer_range": 0.2, **extra, **overrides})
    return model_class(config).to(dtype)


def save_model(folder: Path, architecture: str = "llama", **overrides: Any) -> str:
    """Save the tiny model and its tokenizer as a model folder."""
    make_model(architecture, **overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def save_seeing_model(folder: Path, architecture: str = "Qwen3_5") -> str:
    """Save a tiny model of text and images: a "Qwen3_5" or a "Mistral3". SFTTrainer loads it as this class.

    transformers' class for causal language models is another one for Qwen3_5, and there is none for Mistral3.
    """
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    if architecture == "Qwen3_5":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25}
        text |= {"layer_types": ["full_attention"] * 4, "rope_parameters": rope}
        vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
    else:
        text |= {"model_type": "mistral"}
        vision = {"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                  "head_dim": 8}  # fmt: skip
    vision |= {"hidden_size": 16, "intermediate_size": 16, "patch_size": 14}
    torch.manual_seed(1)
    sizes = getattr(transformers, f"{architecture}Config")(text_config=text, vision_config=vision)
    getattr(transformers, f"{architecture}ForConditionalGeneration")(sizes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def save_trained_adapter(folder: Path, base: str, tokenizer: Any = None, **options: Any) -> str:
    """Save a random adapter of the model that SFTTrainer loads from the folder `base`, and a tokenizer if given."""
    model = get_peft_model(
        create_model_from_path(base, device_map=None), lora(**{"init_lora_weights": False, **options})
    )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def make_rows(count: int = 16) -> Dataset:
    """Return ragged conversational rows with answers of 1 to 24 bytes."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"q{i} " * (i % 4 + 1)}],
                "completion": [
                    {"role": "assistant", "content": "abcdefghijklmnopqrstuvwxyz"[i % 5 : i % 5 + 1 + 3 * (i % 8)]}
                ],
            }
            for i in range(count)
        ]
    )


def make_pool(count: int = 12) -> Dataset:
    """Return a scored pool: the last rows have the highest gap, and every third is a refusal."""
    answers = [f"Sorry, I can't do {i}." if i % 3 == 0 else "sure " * (i % 4 + 1) for i in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"safe {i}"}],
                "completion": [{"role": "assistant", "content": answer}],
                "gap": i / 10,
            }
            for i, answer in enumerate(answers)
        ]
    )


def lora(**overrides: Any) -> LoraConfig:
    return LoraConfig(
        **{
            "r": 4,
            "target_modules": "all-linear",
            "lora_dropout": 0.0,
            "use_rslora": True,
            "task_type": "CAUSAL_LM",
            **overrides,
        }
    )


def config(output_dir: Path, **overrides: Any) -> EMGuardConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "ldifs_layers": "every:2",
        "max_length": None,
    }
    return EMGuardConfig(**{**defaults, **overrides})


def make_trainer(
    output_dir: Path, model: Any = None, rows: Dataset | None = None, peft: Any = None, **options: Any
) -> EMGuardTrainer:
    """Return a trainer on the tiny Llama. `options` go to the config, but for arguments of the trainer."""
    names = ("ref_model", "eval_dataset", "interleave_dataset", "data_collator")
    given = {name: options.pop(name, None) for name in names}
    tokenizer = options.pop("processing_class", None)
    return EMGuardTrainer(
        make_model() if model is None else model,
        config(output_dir, **options),
        train_dataset=make_rows() if rows is None else rows,
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
        peft_config=peft,
        **given,
    )


class FailWithin(TrainerCallback):
    """Callback that raises `RuntimeError("in the middle")` within a forward pass of the second step of a LoRA run.

    Args:
        look: function of no arguments; `seen` is its result right before the failure.
        is_policy: whether to fail in the policy's pass, which has gradients, or in the reference's, which has none.
    """

    def __init__(self, look: Callable[[], Any], is_policy: bool = True) -> None:
        self.look, self.is_policy, self.seen = look, is_policy, None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.handle = decoder_blocks(model.get_base_model())[2].register_forward_hook(self.fail)

    def fail(self, *args: Any) -> None:
        if torch.is_grad_enabled() == self.is_policy:
            self.seen = self.look()
            self.handle.remove()
            raise RuntimeError("in the middle")


class Hub:
    """Stand-in for the hub's client. It keeps each pushed folder's `defense.json`, weights and model card.

    A slow one ends its pushes only in [`finish`].
    """

    def __init__(self, is_slow: bool = False) -> None:
        self.pushed: list[SimpleNamespace] = []
        self.is_slow, self.pending = is_slow, []

    def finish(self) -> None:
        self.is_slow = False
        for push in self.pending:
            push.set_result(None)

    def create_repo(self, name: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path: str, **_: Any) -> Future:
        folder, done = Path(folder_path), Future()
        content = SimpleNamespace(
            record=json.loads((folder / "defense.json").read_text()),
            weights=(folder / "adapter_model.safetensors").read_bytes(),
            card=(folder / "README.md").read_text(),
        )
        self.pushed.append(content)
        if self.is_slow:
            self.pending.append(done)
        else:
            done.set_result(None)
        return done


def logged(trainer: Any, key: str = "loss") -> list[float]:
    """Return the values that a trainer logged under a name, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def record(trainer: Any) -> dict[str, Any]:
    """Return what the trainer's `defense.json` holds now, from a copy of the model that is saved for it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_model(folder)
        found = read_defense_file(folder)
    assert found is not None
    return found


def evidence(trainer: Any, defense: str) -> dict[str, Any]:
    """Return the evidence of one defense of a run, as `defense.json` has it."""
    return record(trainer)["evidence"][defense]
