"""A conversation that remembers its turns."""

from orthrus import Orthrus

conversation = Orthrus.load().chat(system="You answer briefly.", max_new_tokens=32)
for question in ("What is the capital of France?", "And of Italy?"):
    print("you:  ", question)
    print("model:", conversation.send(question).text)
