"""Exports from checkpoints to the formats of other programs: PEFT folders, merged models and files for other engines."""
