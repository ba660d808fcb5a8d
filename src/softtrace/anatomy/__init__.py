"""How a model is taken apart: its layers, what each adds, its norms and its readout."""
