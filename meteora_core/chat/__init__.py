"""Talking with a model: prompts, streaming generation with a reused cache, and the session that the command line shows."""
