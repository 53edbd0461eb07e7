"""Models under evaluation: a base model, and adapters on it or a fine-tuned model beside it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..models.adapters import AdapterSwitch, bare_model, check_adapter_kind
from ..models.batches import eval_mode
from ..models.identity import adapter_scales, check_whole_on_device, fingerprint
from ..models.likelihood import states_logits
from ..models.load import load_base
from ..models.shipped import last_name, public_name, resolve_model
from ..selection.misaligned import AdapterError, adapter_key, load_adapter_config, load_misaligned


BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """A model under evaluation.

    Attributes:
        name: name in the results: `base`, or the name of the adapter or of the fine-tuned model.
        model: the model in memory, which several candidates may share.
        fingerprint: hash of a sample of every weight of the candidate, including its adapter's. An adapter's scaling
            factors are appended.
        switch: switch that activates `adapter` alone during a block of code; `None` leaves the model as it is.
        adapter: name of the adapter to activate; `None` switches all adapters off, which gives the base model.
    """

    name: str
    model: PreTrainedModel | PeftModel
    fingerprint: str
    switch: AdapterSwitch | None = None
    adapter: str | None = None

    @contextmanager
    def acting(self) -> Iterator[PreTrainedModel | PeftModel]:
        """Yield the model. Inside the `with` block only this candidate's adapter is active; none for the base model.

        Without a switch, the model's adapters stay as they are.
        """
        if self.switch is None:
            yield self.model
        else:
            with self.switch.only(self.adapter):
                yield self.model

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Apply this candidate's output head to last hidden states `(P, H)` of P positions: logits `(P, V)`, fp32."""
        with self.acting() as model:
            return states_logits(model, states.to(model.device))


def from_adapters(
    model: PreTrainedModel | PeftModel, adapters: Sequence[str] | Mapping[str, str] = ()
) -> list[Candidate]:
    """Return the base model and its adapters as candidates, the base model first.

    Args:
        model: the model, with all its adapters or without adapters.
        adapters: names of the adapters on the model; or a mapping from the name that results show to the adapter's
            name on the model.

    Raises:
        ValueError: switching the model's adapters off does not give the base model: one is a learned prompt, its
            initialisation changed the base weights, or it trained their biases.
    """
    shown = dict(adapters) if isinstance(adapters, Mapping) else dict(zip(adapters, adapters, strict=True))
    if not isinstance(model, PeftModel):
        return [Candidate(BASE, model, fingerprint(model))]
    for name, config in model.peft_config.items():
        check_adapter_kind(name, config)
        kind = getattr(config, "bias", "none")
        trained = "base_layer.bias" if kind == "lora_only" else "bias"
        if kind != "none" and any(weight.endswith(trained) for weight, _ in model.named_parameters()):
            raise ValueError(
                f"adapter {name!r} was made with bias={kind!r}, which trains biases of the base model, so switching "
                'it off does not give the base model: train it with bias="none".'
            )
    switch, every = AdapterSwitch(model), set(model.peft_config)
    base = Candidate(BASE, model, fingerprint(model, every, is_plain=True), switch)
    fingerprints = {
        key: fingerprint(model, every - {key}, is_plain=True) + adapter_scales(model, key) for key in shown.values()
    }
    return [base] + [Candidate(name, model, fingerprints[key], switch, key) for name, key in shown.items()]


@contextmanager
def in_eval_mode(candidates: Sequence[Candidate]) -> Iterator[None]:
    """Put the candidates' models into eval mode inside the `with` block, because training leaves dropout on."""
    with ExitStack() as stack:
        for model in {id(candidate.model): candidate.model for candidate in candidates}.values():
            stack.enter_context(eval_mode(model))
        yield


def check_candidates(candidates: Sequence[Candidate], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template, and a candidate that answers exactly as the base model does.

    An adapter that was never loaded, or never trained, would otherwise be reported as a model without any drift. A
    candidate whose logits are not finite is refused too.

    Raises:
        ValueError: there is no chat template, a candidate's logits equal the base model's, or logits are not finite.
    """
    for name, problem in unfit(candidates, tokenizer).items():
        raise ValueError(f"{name!r} {problem}")


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: there is no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so questions cannot be asked: take the tokenizer of an instruct "
            "model, or set `chat_template` in it."
        )


@torch.no_grad()
def unfit(candidates: Sequence[Candidate], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return name → problem of each candidate whose logits on a test prompt equal the base model's, or are not finite.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    check_template(tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What should I do today?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    base, found = None, {}
    for candidate in candidates:
        with candidate.acting() as model:
            logits = model(input_ids=prompt.to(bare_model(model).device)).logits.cpu()
        if not logits.isfinite().all():
            found[candidate.name] = "gives logits that are not finite: its training diverged, or its file is damaged."
        elif base is not None and torch.equal(logits, base):
            found[candidate.name] = (
                "answers exactly as the base model does: its weights change nothing. Name the folder that training "
                "saved last, and look whether the training moved the weights at all."
            )
        base = logits if base is None else base
    return found


def load_candidates(
    model: str,
    base: str | None = None,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | None = None,
) -> tuple[list[Candidate], PreTrainedTokenizerBase]:
    """Load the candidates of an evaluation, the base model first, and the tokenizer that they were trained with.

    Args:
        model: folder, hub id or shipped name of the base model; if `base` is given, of the fine-tuned model.
        base: folder, hub id or shipped name of the model that `model` was fine-tuned from.
        adapters: name → folder or hub id of an adapter of `model`.
        dtype: dtype of the weights; "auto" is bf16 on a GPU and fp32 on a CPU.
        device_map: argument of `from_pretrained`; by default the GPU where there is one.

    Raises:
        FileNotFoundError: a model or an adapter does not exist.
        ValueError: both `base` and `adapters` are given, an adapter belongs to another base model or is named `base`,
            a weights file is damaged, a model does not fit on the device, the two models' output heads have different
            sizes, or adapters were trained with different chat templates or end tokens.
    """
    adapters = adapters or {}
    if base is not None and adapters:
        raise ValueError("--base is for a model that was fine-tuned whole; with --adapter, --model is the base model.")
    if BASE in adapters:
        raise ValueError(f"an adapter named {BASE!r} would be mistaken for the base model: name it, NAME=PATH.")
    cuda = torch.cuda.is_available()
    if dtype == "auto":
        dtype = torch.bfloat16 if cuda else torch.float32
    options = {"dtype": dtype, "device_map": device_map or ("auto" if cuda else None)}
    path = resolve_model(model)
    for name, adapter in adapters.items():
        check_base(name, adapter, model)
        load_adapter_config(name, adapter)
    tokenizer = _trained_tokenizer(AutoTokenizer.from_pretrained(path), adapters)
    loaded = _load(path, options)
    if adapters:
        with_adapters = load_misaligned(loaded, adapters).eval()
        return from_adapters(with_adapters, {name: adapter_key(with_adapters, name) for name in adapters}), tokenizer
    if base is None:
        return from_adapters(loaded), tokenizer
    base_model = _load(resolve_model(base), options)
    _check_same_head(base_model, loaded)
    name = public_name(path) if public_name(path) != BASE else "tuned"
    return [*from_adapters(base_model), Candidate(name, loaded, fingerprint(loaded))], tokenizer


def _trained_tokenizer(
    base: PreTrainedTokenizerBase, adapters: Mapping[str, str | os.PathLike]
) -> PreTrainedTokenizerBase:
    """Return the base model's tokenizer, or the one saved with the adapters if its chat template or end token differs.

    Training may set both (`chat_template_path`, `eos_token`), and saves its tokenizer beside the adapter. Differences
    are paired by question, so all candidates must be asked in the same way.

    Raises:
        AdapterError: an adapter's tokenizer differs from an earlier adapter's, or cannot be read.
    """

    def form(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
        return tokenizer.chat_template, tokenizer.eos_token

    first, found = "", base
    for name, path in adapters.items():
        own = base
        try:
            if (Path(path) / "tokenizer_config.json").is_file():
                own = AutoTokenizer.from_pretrained(str(path))
        # Tokenizers raise many types of errors on a damaged file.
        except Exception as error:
            raise AdapterError(path, f"the tokenizer of adapter {name!r} ({path}) cannot be read: {error}") from error
        if own.chat_template is None:
            own = base  # a folder that was copied in part may lack the template's file
        # If neither this adapter's folder nor the base model has a chat template, there is nothing to compare. The
        # adapter is then used with the tokenizer of the other adapters.
        if own is base and base.chat_template is None:
            continue
        if first and form(own) != form(found):
            raise AdapterError(
                path,
                f"adapters {first!r} and {name!r} were trained with different chat templates or end tokens, so no "
                "prompts suit both: evaluate them one at a time.",
            )
        first, found = first or name, own
    return base if form(found) == form(base) else found


def check_base(name: str, adapter: str | os.PathLike, model: str, option: str = "--model") -> None:
    """Refuse an adapter whose config names another base model than `model`.

    Args:
        name: name of the adapter, for the message.
        adapter: folder of the adapter.
        model: name or folder of the model.
        option: option that names the model, for the message.

    Raises:
        ValueError: the config names another base model.
    """
    path = resolve_model(model)
    try:
        trained_on = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    except Exception:
        # The config cannot be read. Callers read it again after this check, and get an error that says why.
        return
    if trained_on and last_name(trained_on) not in {last_name(model), last_name(path)}:
        raise ValueError(
            f"adapter {name!r} ({adapter}) was trained on {trained_on!r}, and {option} is {model!r}: give the model "
            "that it was trained on. If both are the same weights, set `base_model_name_or_path` in the adapter's "
            "adapter_config.json to this model's name."
        )


def _load(path: str, options: dict[str, Any]) -> PreTrainedModel:
    model = load_base(path, **options)
    check_whole_on_device(model)  # refuses weights that accelerate has offloaded, before any adapter is loaded
    return model


def _check_same_head(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    sizes = [model.get_output_embeddings().weight.shape for model in (base, tuned)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--base and --model have heads of other sizes, {tuple(sizes[0])} and {tuple(sizes[1])}, so their answers "
            "cannot be compared: --base is the model that --model was fine-tuned from."
        )
