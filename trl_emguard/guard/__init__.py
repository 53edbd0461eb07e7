"""Guards: functions that a model's patched forward calls in place of the model's stock forward.

The guard [`~trl_emguard.guard.loss.LossGuard`] computes the loss of a defended run's micro-batch in this order:
reference pass, policy pass, output head, loss terms.
"""
