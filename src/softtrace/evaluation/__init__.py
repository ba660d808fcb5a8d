"""Evaluation: measure how much of its graph a model needs, compare runs, draw and tabulate."""
