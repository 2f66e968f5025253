"""Pictures of the routing: which adapter each token was given to, as numbers, an HTML page, or an image."""
