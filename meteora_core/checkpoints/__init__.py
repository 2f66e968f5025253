"""Base models, native checkpoints, and other layouts."""
