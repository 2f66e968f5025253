"""Chat: prompt templates, loading of the model, and the conversation that the command line shows."""
