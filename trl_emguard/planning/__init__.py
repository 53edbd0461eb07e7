"""Plan of a training run, made before weights are loaded: steps, rows, tokens, memory and network traffic."""
