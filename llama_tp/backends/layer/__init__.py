"""All layers of a step at once: in C++ (native). The loop that does the same is in
model/llama.py."""
