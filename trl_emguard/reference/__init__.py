"""The reference model that a policy is held to: how it is chosen, run and cached."""
