"""Test the context that puts a model into eval mode."""

from unittest.mock import Mock

from tiny import make_model

from trl_emguard.models.batches import eval_mode


def test_eval_mode_sets_the_flags_alone(monkeypatch):
    """Call neither `eval` nor `train`, by which transformers may exchange kernels, and restore each module's mode."""
    model = make_model().train()
    model.lm_head.eval()
    monkeypatch.setattr(type(model), "train", Mock(side_effect=AssertionError))
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.lm_head.training
