"""The terminal interface of `meteora chat`, and the pictures of `meteora trace`."""
