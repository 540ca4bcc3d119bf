"""The default model: the stock `generate`, `ar` and `chain` agree on real text, token for token."""

from collections.abc import Callable

import pytest
import torch

from orthrus import GenerationResult, Orthrus

pytestmark = pytest.mark.real

NUM_NEW = 48
PROMPTS = {
    "arithmetic": "A farmer has 17 sheep and buys 5 more each week for 3 weeks. How many are there?",
    "code": "Write a Python function that returns the n-th Fibonacci number, with a loop.",
    "chat": "I have a free Saturday in Lisbon and it is raining. What would you do?",
    "translation": "Translate into French: The train leaves at nine, and we have no tickets yet.",
    "facts": "Explain in three sentences why the sea is salty but rivers are not.",
    "list": "List the numbers from one to thirty in words, separated by commas.",
}


@pytest.fixture(scope="module")
def orthrus() -> Orthrus:
    return Orthrus.load(dtype="float32", device="cpu")


def run(orthrus: Orthrus, prompt: str, **options: object) -> GenerationResult:
    return orthrus.generate(prompt, max_new_tokens=NUM_NEW, **options)


def stock_tokens(orthrus: Orthrus, prompt: str) -> list[int]:
    ids_1T = torch.tensor([orthrus.base.encode_prompt(prompt)])
    eos = sorted(orthrus.base.eos_token_ids)
    with orthrus.stock() as model:
        out_1T = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0],
        )
    return out_1T[0, ids_1T.shape[1] :].tolist()


def test_all_ways_of_decoding_agree_and_some_drafts_hit(
    orthrus: Orthrus, record_property: Callable[[str, object], None]
) -> None:
    num_accepted = {"floor": 0, "no floor": 0}
    for name, prompt in PROMPTS.items():
        expected = stock_tokens(orthrus, prompt)
        results = {
            "ar": run(orthrus, prompt, strategy="ar"),
            "floor": run(orthrus, prompt),
            "no floor": run(orthrus, prompt, floor=False),
        }
        for way, result in results.items():
            assert list(result.token_ids) == expected, f"{name}, {way}"
        for way in num_accepted:
            num_accepted[way] += results[way].stats.num_accepted
            record_property(f"acceptance, {name}, {way}", results[way].stats.acceptance_rate)
            print(f"{name:12} {way:9} {results[way].stats.acceptance_rate:.3f}")
    assert all(num_accepted.values())


def test_the_whole_text_is_the_tokenizers_own_decoding(orthrus: Orthrus) -> None:
    result = run(orthrus, PROMPTS["translation"])
    assert result.text == orthrus.base.tokenizer.decode(list(result.token_ids), skip_special_tokens=True)
    assert "".join(c.text for c in result.cycles) == result.text
