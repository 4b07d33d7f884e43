"""Requests to tokens: scheduling on the driver, the same step on every rank. Knows no http, argv or
stdout."""
