"""Integrations of Meteora into other programs."""
