"""The parts written in C++ for CPUs: attention, products, whole layers, and collectives between the
ranks of one host. `python -m llama_tp.native.build` compiles them; without them torch and gloo do
the work. native.h declares what they export; calls.py is how the other rooms call it."""
