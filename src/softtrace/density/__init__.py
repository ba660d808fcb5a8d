"""The measure: how much of its graph a model needs, token by token."""
