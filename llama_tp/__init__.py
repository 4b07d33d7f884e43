"""llama_tp: tensor-parallel inference for Llama 3 checkpoints in any layout, on any number of ranks."""
