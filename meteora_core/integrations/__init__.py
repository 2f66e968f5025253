"""Meteora inside other people's programs."""
