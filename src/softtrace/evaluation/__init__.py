"""Measure a text: parts, statistics, intervals, and density.json."""
