"""Two views over one cache: twins, the slot pool, passes over rows, and the storage of views."""
