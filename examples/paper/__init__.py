"""The paper's experiment on a small base model, step by step with the ``meteora`` commands of ``steps.toml``; see README.md here."""
