"""One live model: how it is loaded, where it lies, its state, hooks and attention."""
