"""llama2.c: its `model.bin`."""
