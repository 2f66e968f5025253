"""LoRA adapters: reading PEFT folders, and stacking many of them into one bank."""
