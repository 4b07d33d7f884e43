"""The arithmetic between the products: in C++ (native), by torch.compile (compiled). The plain one
is in model/llama.py."""
