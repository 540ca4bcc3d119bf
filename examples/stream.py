"""Watch an answer come: one record a cycle, drafted tokens counted as they are committed."""

from orthrus import Orthrus

orthrus = Orthrus.load()
stream = orthrus.stream("Explain in two sentences why the sea is salty.", max_new_tokens=64)
for cycle in stream:
    print(cycle.text, end="", flush=True)
stats = stream.result.stats
print(f"\n{stats.num_tokens} tokens in {stats.num_passes} passes, {stats.num_accepted} of them drafted")
