"""Short scripts and a notebook that use transformers, PEFT and TRL with a model that has adapters attached."""
