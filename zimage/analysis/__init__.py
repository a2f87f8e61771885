"""Tables, figures and judgements derived from stored results. Nothing here imports MLX."""
