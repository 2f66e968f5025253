"""The server: continuous batching over one model with adapters, and an HTTP interface that OpenAI's clients understand."""
