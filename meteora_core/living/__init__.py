"""Banks that change: adds adapters to a checkpoint or a loaded model, removes them, and makes a routed model of a folder of adapters."""
