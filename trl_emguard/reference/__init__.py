"""The reference model that a policy is kept close to: how it is chosen, run and cached."""
