"""How many bits a number takes: quantization of keys and values."""
