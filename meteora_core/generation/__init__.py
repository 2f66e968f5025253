"""From a model and prompts to tokens: batches, streams, caches, and the rules by which an answer ends."""
