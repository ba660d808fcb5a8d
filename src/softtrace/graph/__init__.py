"""Pure tensors: edges, batches, importances, traces, their sizes, and masks."""
