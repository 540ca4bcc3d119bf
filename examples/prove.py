"""Lossless: the stock model's own `generate` and Orthrus give the same token ids."""

import torch

from orthrus import Orthrus

orthrus = Orthrus.load()
prompt_ids = orthrus.base.encode_prompt("What is the sum of 17 and 25?")
ours = orthrus.generate("What is the sum of 17 and 25?", max_new_tokens=32).token_ids
model = orthrus.stock()
input_ids = torch.tensor([prompt_ids], device=model.device)
mask = torch.ones_like(input_ids)
output = model.generate(
    input_ids,
    attention_mask=mask,
    max_new_tokens=32,
    do_sample=False,
    eos_token_id=sorted(orthrus.base.eos_token_ids),
    pad_token_id=0,
)
print("equal" if tuple(output[0, len(prompt_ids) :].tolist()) == ours else "different")
