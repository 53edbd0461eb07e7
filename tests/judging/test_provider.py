"""The provider of inspect_ai: its answers are those of the package's own sampler, in batches of any size."""

import asyncio
from unittest.mock import Mock

import pytest
import yaml
from methods import save_adapter
from tiny import make_tokenizer, save_model

from trl_emguard.evaluation.candidates import load_candidates
from trl_emguard.models.sampler import sample_answers


QUESTIONS = [{"id": f"q{i}", "paraphrases": [f"Why {i}?"]} for i in range(3)]


def answers(folder, model, ids=None, **model_args):
    """Return id → output of a task that asks each question twice, through inspect_ai, for all samples or `ids`."""
    from inspect_ai import eval as inspect_eval
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from trl_emguard.judging.tasks import general

    def says_100(*_):
        output = ModelOutput.from_content("mockllm", "100")
        output.usage = ModelUsage()  # inspect_ai would fetch a tokenizer to count the tokens
        return output

    folder.mkdir()
    (folder / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS))
    judge = get_model("mockllm/model", custom_outputs=says_100)
    (log,) = inspect_eval(
        general(str(folder / "questions.yaml"), samples_per_question=2),
        model=f"trl_emguard/{model}",
        model_args=model_args,
        model_roles={"judge": judge},
        log_dir=str(folder / "logs"),
        display="none",
        sample_id=ids,
        max_tokens=8,
    )
    assert log.status == "success", log.error
    return {sample.id: sample.output for sample in log.samples}


def test_answers_are_the_samplers(tmp_path):
    model, adapter = save_model(tmp_path / "model"), save_adapter(tmp_path / "adapter")
    found = {size: answers(tmp_path / f"b{size}", model, adapter=adapter, batch_size=size) for size in (1, 4)}
    texts = {size: {id: output.completion for id, output in found[size].items()} for size in found}
    assert sorted(texts[1].values()) == sorted(texts[4].values())
    assert len(set(texts[1].values())) == 6
    assert all(output.stop_reason in ("stop", "max_tokens") for output in found[1].values())
    assert all(0 < output.usage.output_tokens <= 8 for output in found[1].values())
    plain = answers(tmp_path / "plain", model)
    assert sorted(output.completion for output in plain.values()) != sorted(texts[1].values())


def test_samples_that_are_asked_again_later_get_seeds_of_their_own(tmp_path):
    """Ask the second half of the samples in another process, as `inspect eval-retry` does: no answer is a copy.

    Another size of the batches makes inspect_ai load the model anew, as another process does.
    """
    model = save_model(tmp_path / "model")
    halves = [
        answers(tmp_path / f"half{i}", model, [f"q{q}#{i}" for q in range(3)], batch_size=1 + i) for i in range(2)
    ]
    texts = [output.completion for half in halves for output in half.values()]
    assert len(set(texts)) == len(texts) == 6


def test_greedy_answers_are_the_samplers_to_the_letter(tmp_path):
    from inspect_ai.model import GenerateConfig, get_model

    import trl_emguard.judging.tasks  # noqa: F401 (registers the provider)

    path = save_model(tmp_path / "model")
    asked = get_model(f"trl_emguard/{path}", config=GenerateConfig(temperature=0.0, max_tokens=12))
    (candidate, *_), tokenizer = load_candidates(path)
    for text in ("Hello?", "And now?"):
        output = asyncio.run(asked.generate(text))
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        ((answer,),) = sample_answers(
            candidate.model, tokenizer, [ids["input_ids"]], max_new_tokens=12, batch_size=1, temperature=0
        )
        assert output.completion == answer.text


def test_thoughts_are_no_part_of_the_answer(tmp_path):
    from inspect_ai.model import GenerateConfig, get_model

    import trl_emguard.judging.tasks  # noqa: F401 (registers the provider)

    path = save_model(tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    output = asyncio.run(get_model(f"trl_emguard/{path}", config=GenerateConfig(max_tokens=4)).generate("Hello?"))
    assert (output.stop_reason, output.completion) == ("max_tokens", "")
    assert output.message.content[0].reasoning


def test_a_call_that_failed_does_not_fail_the_next(tmp_path, monkeypatch):
    from inspect_ai.model import GenerateConfig, get_model

    import trl_emguard.judging.tasks  # noqa: F401 (registers the provider)

    model = get_model(f"trl_emguard/{save_model(tmp_path / 'model')}", config=GenerateConfig(max_tokens=4))
    with monkeypatch.context() as patch:
        patch.setattr("trl_emguard.judging.provider.sample_answers", Mock(side_effect=RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            asyncio.run(model.generate("Hello?"))
    assert model.api.waiting == []
    assert asyncio.run(model.generate("And now?")).stop_reason in ("stop", "max_tokens")


def test_what_the_sampler_cannot_do_is_refused(tmp_path):
    from inspect_ai.model import GenerateConfig, get_model

    import trl_emguard.judging.tasks  # noqa: F401 (registers the provider)

    asked = get_model(f"trl_emguard/{save_model(tmp_path / 'model')}", config=GenerateConfig(top_p=0.5))
    with pytest.raises(Exception, match="plain distribution"):
        asyncio.run(asked.generate("Hello?"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(Exception, match="no chat template"):
        get_model(f"trl_emguard/{tmp_path / 'model'}", memoize=False)
