"""Attach to a model, prove the anatomy, and run it recorded or masked."""
