"""Figures of the pages, from the result files."""
