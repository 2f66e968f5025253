"""Training: tokenised rows, a plan of batches, losses, one loop, and the two stages that use it."""
