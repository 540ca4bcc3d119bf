"""Sampling with a seed: the law is the base model's own, and the same seed gives the same text."""

from orthrus import Orthrus

orthrus = Orthrus.load()
for seed in (1, 1, 2):
    result = orthrus.generate("Name a colour.", max_new_tokens=16, temperature=0.9, top_p=0.95, seed=seed)
    print(seed, result.text)
