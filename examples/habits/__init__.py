"""transformers, PEFT and TRL with a model that has adapters attached: one short script for each habit, and a notebook."""
