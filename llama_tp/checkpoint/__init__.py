"""Disk to one rank's tensors, from Meta or HF layout, at any tensor-parallel degree. Starts no
process group."""
