"""What the study reads of a model, and the answers it gives."""
