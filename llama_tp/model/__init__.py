"""The model: one forward pass of one rank's share. Knows nothing of files, requests or text."""
