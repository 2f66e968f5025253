"""Launches that several paths share: routing, the middle, products, and B on top of a base output."""
