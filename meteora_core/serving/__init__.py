"""The server: continuous batching for one model with adapters, and an HTTP interface that is compatible with OpenAI's clients."""
