"""MeteoRA layers, and putting them into a model and taking them out."""
