"""The training engine: one recipe, rung by rung."""
