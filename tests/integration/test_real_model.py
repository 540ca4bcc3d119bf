"""The default model: the stock `generate` and every strategy agree on real text, token for token."""

from typing import Any

import pytest
import torch
from tests.ways import WAYS

from orthrus import GenerationResult, Orthrus

pytestmark = pytest.mark.real

NUM_NEW = 24
# Small passes: on one busy core each row counts.
BUDGETS = {"node_budget": 8, "block_budget": 2}
# A text with many drafts that stand, and one with few.
PROMPTS = {
    "arithmetic": "A farmer has 17 sheep and buys 5 more each week for 3 weeks. How many are there?",
    "chat": "I have a free Saturday in Lisbon and it is raining. What would you do?",
}


@pytest.fixture(scope="module")
def orthrus() -> Orthrus:
    return Orthrus.load(dtype="float32", device="cpu")


def run(orthrus: Orthrus, prompt: str, **options: Any) -> GenerationResult:
    return orthrus.generate(prompt, **{"max_new_tokens": NUM_NEW, **BUDGETS, **options})


def stock_tokens(orthrus: Orthrus, prompt: str, **options: Any) -> tuple[int, ...]:
    ids_1T = torch.tensor([orthrus.base.encode_prompt(prompt)])
    eos = sorted(orthrus.base.eos_token_ids)
    model = orthrus.stock()
    out_1T = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos[0],
        **{"max_new_tokens": NUM_NEW, **options},
    )
    return tuple(out_1T[0, ids_1T.shape[1] :].tolist())


def check_every_way(
    orthrus: Orthrus, prompt: str, expected: tuple[int, ...], **options: Any
) -> dict[str, int]:
    """Accepted drafts by strategy, once all texts are found to be the expected one."""
    num_accepted: dict[str, int] = {}
    for strategy, floor in WAYS:
        result = run(orthrus, prompt, strategy=strategy, floor=floor, **options)
        assert result.token_ids == expected, (strategy, floor)
        num_accepted[f"{strategy} {floor}"] = result.stats.num_accepted
    return num_accepted


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_every_strategy_gives_the_stock_text_and_some_drafts_hit(orthrus: Orthrus, prompt: str) -> None:
    num_accepted = check_every_way(orthrus, prompt, stock_tokens(orthrus, prompt))
    assert num_accepted.pop("ar True") == 0
    assert min(num_accepted.values()) > 0


def test_a_penalty_is_the_stock_models_own(orthrus: Orthrus) -> None:
    prompt, options = PROMPTS["arithmetic"], {"repetition_penalty": 1.3, "max_new_tokens": 12}
    expected = stock_tokens(orthrus, prompt, **options)
    assert expected != stock_tokens(orthrus, prompt, max_new_tokens=12)
    check_every_way(orthrus, prompt, expected, **options)


def test_one_seed_is_one_text(orthrus: Orthrus) -> None:
    options = {"temperature": 0.8, "top_p": 0.95, "seed": 7, "max_new_tokens": 12}
    plain = run(orthrus, PROMPTS["chat"], strategy="ar", **options)
    check_every_way(orthrus, PROMPTS["chat"], plain.token_ids, **options)


def test_the_whole_text_is_the_tokenizers_own_decoding(orthrus: Orthrus) -> None:
    result = run(orthrus, PROMPTS["chat"])
    assert result.text == orthrus.base.tokenizer.decode(list(result.token_ids), skip_special_tokens=True)
    assert "".join(c.text for c in result.cycles) == result.text
