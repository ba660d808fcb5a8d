"""Trainings that are paired and compared: the penalty's effect, and baselines."""
