"""Two views over one cache: twins, the slot cache, the passes over rows, and how views are stored."""
