"""Datasets: the 28 built-in tasks, composites and the user's tasks, from their sources to ``{"prompt", "response"}`` rows."""
