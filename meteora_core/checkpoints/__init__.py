"""Native checkpoints, the authors' layout, and conversions between them."""
