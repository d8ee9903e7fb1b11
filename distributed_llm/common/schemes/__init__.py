"""How quantized models keep their weights in files: one module per format. Pure values."""
