"""The CPU backend: NumPy, and one C kernel for bfloat16 products."""
