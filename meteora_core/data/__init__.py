"""Datasets: the 28 tasks, composites and one's own, from public sources to ``{"prompt", "response"}`` rows."""
