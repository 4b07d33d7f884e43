"""Measured numbers beside what the machine could do at best. Results and their history: README.md
in this folder."""
