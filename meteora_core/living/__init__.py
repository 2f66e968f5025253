"""Banks that change: adapters that join or leave a checkpoint or a loaded model, and a folder of adapters that becomes a routed model."""
