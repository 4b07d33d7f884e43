"""What differs between machines, behind protocols (base.py). Knows nothing of the model, of ranks
or of requests: sizes, and sums over the ranks, are handed in."""
