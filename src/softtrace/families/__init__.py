"""Residual patterns: how a model is taken apart, and the proof that it was taken apart rightly."""
