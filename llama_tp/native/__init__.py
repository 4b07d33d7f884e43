"""The parts written in C++ for CPUs: kernels.cpp (attention and the small operations around it) and
shared.cpp (sums between ranks of one host). `python -m llama_tp.native.build` compiles them;
without them torch and gloo do the work."""
