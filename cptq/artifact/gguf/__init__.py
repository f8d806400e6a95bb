"""Parts of GGUF files for llama.cpp besides the weights: names, sizes, vocabulary, header."""
