"""Every family, every strategy: the tokens of the stock model's own `generate`, and drafts that hit."""

from functools import cache

import pytest
import torch
from tests import engines
from tests.rows import Rows
from tests.tiny import FAMILY_CONFIGS, VARIANTS, tiny_dual, tiny_prompt, variant_of
from tests.unit.test_policy import FLAT
from torch import nn

from orthrus.base.devices import check_attention
from orthrus.config import DecodeConfig, Strategy
from orthrus.engine.costs import Costs
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.runner import Runner
from orthrus.model.twin import Twin, twins
from orthrus.types import GenerationResult

WINDOW = 12
NUM_NEW = 32
# One prompt lies inside the sliding window, one reaches well beyond it; the answers always do.
PROMPTS = (tiny_prompt(9, seed=0), tiny_prompt(30, seed=1), tiny_prompt(17, seed=2))
# With these seeds the models answer with varied text.
SEEDS = {"qwen3": 4, "qwen3-moe": 2}
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILY_CONFIGS)
CHAINS = {
    "floor": DecodeConfig(max_new_tokens=NUM_NEW, strategy="chain"),
    "no floor": DecodeConfig(max_new_tokens=NUM_NEW, strategy="chain", floor=False),
    "floor, K 3": DecodeConfig(max_new_tokens=NUM_NEW, strategy="chain", block_size=3),
    "no floor, K 2": DecodeConfig(max_new_tokens=NUM_NEW, strategy="chain", block_size=2, floor=False),
    "no floor, K 5": DecodeConfig(max_new_tokens=NUM_NEW, strategy="chain", block_size=5, floor=False),
}
OTHERS = {
    "tree": DecodeConfig(max_new_tokens=NUM_NEW, strategy="tree"),
    "tree, no floor, 12 nodes": DecodeConfig(
        max_new_tokens=NUM_NEW, strategy="tree", floor=False, node_budget=12
    ),
    "fused": DecodeConfig(max_new_tokens=NUM_NEW, strategy="fused", block_budget=8),
    "fused_tree": DecodeConfig(max_new_tokens=NUM_NEW, strategy="fused_tree"),
}
CHUNKS = {"floor, K 3": 7, "no floor, K 5": 1, "fused_tree": 7}
"""Rows of a prompt in one pass, where it is cut."""


@cache
def dual_of(name: str) -> DualView:
    return tiny_dual(name, seed=SEEDS.get(name, 0), disturb=0.15)


@cache
def stock_texts(name: str) -> list[tuple[int, ...]]:
    """What the untouched model generates with its own code and its own cache."""
    model = dual_of(name).stock()
    assert not twins(model)
    return [stock_text(model, prompt) for prompt in PROMPTS]


def stock_text(model: nn.Module, prompt: list[int]) -> tuple[int, ...]:
    ids_1T = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    out_1T = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(out_1T[0, len(prompt) :].tolist())


def decode(
    dual: DualView | Runner, prompt: list[int], config: DecodeConfig, chunk: int = 256
) -> GenerationResult:
    return engines.decode(dual, prompt, config, chunk=chunk)


@EVERY_FAMILY
def test_the_models_of_this_file_are_worth_testing_with(name: str) -> None:
    texts = stock_texts(name)
    assert all(len(text) == NUM_NEW > WINDOW for text in texts)
    assert sum(len(set(text)) for text in texts) >= 9
    assert len(set(texts)) == len(texts)


@EVERY_FAMILY
@pytest.mark.parametrize("chunk", [512, 7])
def test_ar_is_the_stock_model(name: str, chunk: int) -> None:
    config = DecodeConfig(max_new_tokens=NUM_NEW, strategy="ar")
    results = [decode(dual_of(name), prompt, config, chunk) for prompt in PROMPTS]
    assert [r.token_ids for r in results] == stock_texts(name)
    assert {r.stats.num_drafted for r in results} == {0}


@EVERY_FAMILY
@pytest.mark.parametrize("kind", CHAINS | OTHERS)
def test_drafting_gives_the_stock_models_text_and_drafts_hit_and_miss(name: str, kind: str) -> None:
    config = (CHAINS | OTHERS)[kind]
    results = [decode(dual_of(name), prompt, config, CHUNKS.get(kind, 256)) for prompt in PROMPTS]
    assert [r.token_ids for r in results] == stock_texts(name)
    num_drafted = sum(r.stats.num_drafted for r in results)
    num_accepted = sum(r.stats.num_accepted for r in results)
    assert 0 < num_accepted < num_drafted
    # Longer prefixes than one token must stand at times, or only row 0 of the block would be tried.
    if config.block_size is None:
        assert max(len(r.stats.accepted_histogram) for r in results) > 2


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-sliding", "phi3", "gemma2", "olmo2"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "all"])
def test_views_of_every_kind_are_lossless_and_draft(name: str, variant: str) -> None:
    # Disturbed twins of the MLP stray further from the base.
    dual = tiny_dual(name, disturb=0.05 if "MLP" in variant else 0.15, **variant_of(name, variant))
    for config in (CHAINS["floor"], CHAINS["no floor"], OTHERS["fused_tree"]):
        results = [decode(dual, prompt, config) for prompt in PROMPTS]
        assert [r.token_ids for r in results] == stock_texts(name)
        assert 0 < sum(r.stats.num_accepted for r in results) < sum(r.stats.num_drafted for r in results)


@EVERY_FAMILY
def test_every_draft_of_an_undisturbed_first_row_hits(name: str) -> None:
    """Twins equal to the base: row 0 sees what an AR row sees, so without floor its guess is the AR token."""
    dual = tiny_dual(name, seed=SEEDS.get(name, 0))
    config = DecodeConfig(max_new_tokens=NUM_NEW, strategy="chain", floor=False)
    for prompt, text in zip(PROMPTS, stock_texts(name), strict=True):
        result = decode(dual, prompt, config)
        assert result.token_ids == text
        # A row that fills its context with masks differs a little; nothing else may.
        assert result.stats.num_accepted > 0


@EVERY_FAMILY
@pytest.mark.parametrize("chunk", [64, 5])
def test_prefill_logits_are_the_stock_models(name: str, chunk: int) -> None:
    dual, prompt = dual_of(name), tiny_prompt(41, seed=3)
    rows = Rows(dual)
    logits_TV = torch.cat(
        [rows.feed(prompt[start : start + chunk]) for start in range(0, len(prompt), chunk)]
    )
    rows.slots.check()
    with torch.inference_mode():
        expected_TV = dual.stock()(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits_TV, expected_TV, atol=1e-5, rtol=1e-5)


@EVERY_FAMILY
def test_stock_gives_back_the_original_modules(name: str) -> None:
    dual = dual_of(name)
    before = twins(dual.base)
    weights = {path: twin.ar.state_dict() for path, twin in before.items()}
    assert before
    model = dual.stock()
    for path, twin in before.items():
        module = model.get_submodule(path)
        assert module is twin.ar
        for key, tensor in weights[path].items():
            assert torch.equal(module.state_dict()[key], tensor)
    assert not any(isinstance(module, Twin) for module in model.modules())
    assert twins(dual.base) == before


def test_stock_and_views_run_at_the_same_time() -> None:
    """Nothing is swapped: a stock model lives beside a request that is half done."""
    dual, prompt = dual_of("llama"), PROMPTS[0]
    running = engines.stream(dual, prompt, OTHERS["fused_tree"])
    next(running)
    next(running)
    model = dual.stock()
    assert stock_text(model, prompt) == stock_texts("llama")[0]
    next(running)
    assert stock_text(model, prompt) == stock_texts("llama")[0]
    result = running.drain()
    assert result.token_ids == stock_texts("llama")[0]
    assert result.stats.num_accepted > 0


@EVERY_FAMILY
def test_the_text_does_not_hang_on_the_attention_of_the_stock_model(name: str) -> None:
    dual = tiny_dual(name, seed=SEEDS.get(name, 0), disturb=0.15)
    # Gemma 2 caps its scores, which sdpa cannot, so transformers has no sdpa for it.
    for implementation in ("eager", "sdpa") if name != "gemma2" else ("eager",):
        dual.base.set_attn_implementation(implementation)
        assert dual.base.config._attn_implementation == implementation
        for config in (CHAINS["floor"], OTHERS["fused_tree"]):
            results = [decode(dual, prompt, config) for prompt in PROMPTS]
            assert [r.token_ids for r in results] == stock_texts(name)
            assert 0 < sum(r.stats.num_accepted for r in results) < sum(r.stats.num_drafted for r in results)
        assert [stock_text(dual.stock(), prompt) for prompt in PROMPTS] == stock_texts(name)


@EVERY_FAMILY
@pytest.mark.parametrize("strategy", ["ar", "chain", "fused_tree"])
def test_prompts_together_are_prompts_alone(name: str, strategy: Strategy) -> None:
    """All in one engine, so that passes carry the rows of several: the stock model's text, the same drafts."""
    config = DecodeConfig(max_new_tokens=NUM_NEW, strategy=strategy)
    engine = engines.engine_for(dual_of(name), chunk=16)
    requests = [engine.submit(prompt, config, eos_token_ids=frozenset()) for prompt in PROMPTS]
    engines.run_all(engine, requests)
    assert [tuple(r.token_ids) for r in requests] == stock_texts(name)
    for request, prompt in zip(requests, PROMPTS, strict=True):
        alone = engines.engine_for(dual_of(name), chunk=16)
        again = alone.submit(prompt, config, eos_token_ids=frozenset())
        engines.run_all(alone, [again])
        assert engines.acceptance(request) == engines.acceptance(again)
    num_accepted = sum(cycle.num_accepted for r in requests for cycle in r.cycles)
    assert (num_accepted > 0) == (strategy != "ar")


def test_flex_attention_is_refused_on_a_cpu_where_its_compiled_form_crashes() -> None:
    with pytest.raises(UserInputError, match=r"flex_attention.*CPU.*sdpa"):
        check_attention("flex_attention", "cpu")
    check_attention("flex_attention", "cuda:0")
    check_attention("sdpa", "cpu")


@pytest.mark.parametrize("strategy", ["chain", "fused_tree", "auto"])
def test_a_view_of_k_2_with_floor_has_no_draft_left_and_says_so(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor's AR row decides what the only draft would: every cycle is a plain one."""
    monkeypatch.setattr("orthrus.engine.engine.pass_costs", lambda *_, **__: Costs(FLAT, FLAT))
    dual = tiny_dual("llama", disturb=0.15, block_size=2)
    result = decode(dual, PROMPTS[0], DecodeConfig(max_new_tokens=NUM_NEW, strategy=strategy, copies=False))
    assert result.token_ids == stock_texts("llama")[0]
    assert {c.kind for c in result.cycles[1:]} == {"ar"}
    assert result.stats.num_drafted == 0
