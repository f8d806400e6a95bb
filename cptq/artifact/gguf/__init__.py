"""What GGUF files for llama.cpp need beside the weights: names, sizes, vocabulary."""
