"""Llama on paper: names, shapes and arithmetic, no torch. Every other room reads the same table
here."""
