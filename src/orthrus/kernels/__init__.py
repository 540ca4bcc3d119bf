"""Kernels of our own for the few rows of a pass on a CPU, compiled on the machine that they run on."""
