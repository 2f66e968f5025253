"""Text generation: batched and streamed decoding, key-value caches, and the rules that end an answer."""
