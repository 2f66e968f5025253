"""What `meteora chat` and `meteora trace` show in a terminal."""
