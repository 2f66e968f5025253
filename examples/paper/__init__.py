"""The paper's experiment on a small base model, in steps that are ``meteora`` commands (``steps.toml``). README.md explains it."""
