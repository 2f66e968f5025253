"""Runs the command line as ``python -m meteora_cli``."""

from meteora_cli.app import entry

entry()
