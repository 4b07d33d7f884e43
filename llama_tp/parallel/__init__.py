"""The ranks: process groups, collectives, liveness, logging. Knows nothing of requests or
weights."""
