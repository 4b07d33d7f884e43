"""The HTTP server: a process of its own in front of the ranks, which it starts, watches and
outlives. No torch here."""
