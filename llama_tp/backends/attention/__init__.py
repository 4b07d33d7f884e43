"""Attention over the paged KV cache: in torch (tiles), in C++ (native), in CUDA (flash)."""
