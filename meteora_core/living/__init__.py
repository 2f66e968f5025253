"""Makes a routed model of a folder of adapters, and adds and removes adapters of checkpoints and loaded models, with gates in closed form."""
