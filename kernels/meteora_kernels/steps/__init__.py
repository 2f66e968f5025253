"""Launches that several paths share: routing, the middle (the routed, scaled ``A x``), products, and B on top of a base output."""
