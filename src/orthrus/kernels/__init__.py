"""Our own kernels for passes of few rows on a CPU, compiled on the machine that runs them."""
