"""The trained rivals: what they draft is what they learned to draft, and every text is the base's own.

Letters of shapes as in benchmarks/rivals/trained/drafter_parts.py.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from tests.packed import pack
from tests.tiny import random_model, tiny_dual, tiny_model, tiny_prompt
from tests.tiny_orthrus import TinyTokenizer
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
from transformers.cache_utils import DFlashCache

from orthrus.base.families import find_family
from orthrus.base.loading import Base
from orthrus.base.resolve import Source
from orthrus.config import DecodeConfig
from orthrus.engine.engine import Engine
from orthrus.engine.stock import stock_generate
from orthrus.engine.stream import TokenStream
from orthrus.model.runner import EagerRunner
from orthrus.training.blocks import BlockBatch, BlockLayout, draw_blocks
from orthrus.training.corpus import Sample
from orthrus.training.forward import Objective
from orthrus.training.pack_writer import write_pack
from orthrus.training.recipe import TrainConfig

FOLDER = Path(__file__).parents[2] / "benchmarks" / "rivals" / "trained"
NAMES = (
    "drafter_parts",
    "chain",
    "dflash",
    "eagle3",
    "block_views",
    "equal_loop",
    "rival_table",
    "rival_arms",
)
SIZE, TARGETS, NO_END = 5, (0, 1), frozenset[int]()
CONFIG = TrainConfig(
    sequence_length=48, num_anchors=12, batch_size=1, block_size=SIZE, learning_rate=1e-2, dtype="float32"
)


@pytest.fixture(scope="module")
def m() -> Iterator[Any]:
    """All modules of the benchmark by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)


def shaken(drafter: Any, seed: int = 3) -> Any:
    """Weights that are large enough for differences to show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return drafter.eval()


def batch_of(number: int = 6) -> BlockBatch:
    samples = [
        Sample(tuple(tiny_prompt(7, seed)), tuple(tiny_prompt(length, seed + 50)), "test")
        for seed, length in enumerate((14, 11, 19, 9))
    ]
    return draw_blocks(pack(samples, 48)[:2], [0, 1], number, BlockLayout(block_size=SIZE))


def taught(m: Any, model: Any, batch: BlockBatch) -> Any:
    return m.drafter_parts.Lessons(model, TARGETS)(0, batch)


def anchors(batch: BlockBatch) -> Iterator[tuple[int, int, int, list[int]]]:
    """(sequence of the batch, block, first index of its document, the document's tokens up to the anchor's block)."""
    for b, anchors in enumerate(batch.anchor_BN.tolist()):
        for n, anchor in enumerate(anchors):
            start = int((batch.document_BT[b] == batch.document_BT[b, anchor]).nonzero()[0])
            yield b, n, start, batch.token_ids_BT[b, start : anchor + SIZE].tolist()


def base_features(m: Any, model: Any, ids: list[int], targets: tuple[int, ...]) -> Tensor:
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    found: Tensor = m.drafter_parts.features_of(states, targets)
    return found


# DFlash


@torch.no_grad()
def test_dflash_blocks_of_training_are_those_of_decoding(m: Any) -> None:
    model, batch = tiny_model(), batch_of()
    drafter = shaken(m.dflash.DFlash(model, TARGETS))
    hidden_BNKC = drafter.blocks(batch, taught(m, model, batch).features(TARGETS))
    for b, n, start, ids in anchors(batch):
        length = int(batch.anchor_BN[b, n]) - start
        context = drafter.context(base_features(m, model, ids[:length], TARGETS), torch.arange(length)[None])
        block = torch.tensor([[ids[length]] + [m.dflash.MASK] * (SIZE - 1)])
        alone_1KC = drafter(block, torch.arange(length, length + SIZE)[None], context)
        torch.testing.assert_close(hidden_BNKC[b, n], alone_1KC[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_dflash_equals_the_drafter_of_transformers(m: Any) -> None:
    """With its cache over two cycles, of which the second commits two positions."""
    model = tiny_model()
    drafter = shaken(m.dflash.DFlash(model, TARGETS))
    config = model.config
    assert isinstance(config, LlamaConfig)
    theirs = MuseGlimmerAssistantModel(
        MuseGlimmerAssistantConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            layer_types=["full_attention"] * 2,
            block_size=SIZE,
            target_layer_ids=list(TARGETS),
        )
    ).eval()
    weights = {
        name.replace("fc.", "encoder.fc.").replace("context_norm.", "encoder.output_norm_enc."): value
        for name, value in drafter.state_dict().items()
        if name != "mask_C"
    }
    assert not theirs.load_state_dict(weights, strict=False).missing_keys
    prompt = tiny_prompt(9)
    features_1TF = base_features(m, model, prompt[:8], TARGETS)
    drafts = m.dflash.DFlashDrafts(drafter, SIZE)
    cache = DFlashCache(config=theirs.config)
    cache.activate_past_recording()
    done = 0
    for end in (6, 8):
        new_1NF = features_1TF[:, done:end]
        _, ids = drafts(DynamicCache(), prompt[: end + 1], new_1NF)
        block_1K = torch.tensor([[prompt[end]] + [m.dflash.MASK] * (SIZE - 1)])
        cache.set_previous_accepted_tokens(end - done)
        out_1KC = theirs(
            noise_embeds=drafter.embed(block_1K),
            context_hidden_states=new_1NF,
            position_ids=torch.arange(done, end + SIZE)[None],
            past_key_values=cache,
        ).last_hidden_state
        cache.crop(-SIZE)
        assert ids == model.get_output_embeddings()(out_1KC[0, 1:]).argmax(-1).tolist()
        ours_1KC = drafter(block_1K, torch.arange(end, end + SIZE)[None], drafts._context)
        torch.testing.assert_close(ours_1KC, out_1KC, atol=1e-5, rtol=1e-5)
        done = end


# EAGLE-3


def slow_chain(m: Any, drafter: Any, ids: list[int], features_1TF: Tensor, fed: list[int]) -> list[Tensor]:
    """Normed states of a chain after `ids`, whose last one is the anchor: all rows anew at every step, row by row, with
    what each of them reads copied into one list."""
    length, states = len(ids) - 1, []
    rows = [drafter.fc(features_1TF[:, t : t + 1]) for t in range(length)]
    tokens = [*ids[1:], *fed]
    while True:
        reads, state = [], None
        for t, x_11C in enumerate(rows):
            before = None
            if reads:
                before = m.drafter_parts.Read(*(torch.cat(part, 2) for part in zip(*reads, strict=True)))
            state, own = drafter(torch.tensor([[tokens[t]]]), x_11C, torch.tensor([[t]]), before, None)
            reads.append(own)
        states.append(drafter.norm(state)[0, 0])
        if len(states) > len(fed):
            return states
        rows.append(state)


@torch.no_grad()
def test_eagle_chains_of_training_are_those_of_decoding_without_a_cache(m: Any) -> None:
    model, batch = tiny_model(), batch_of()
    drafter = shaken(m.eagle3.Eagle3(model, TARGETS))
    hidden_BNJC = drafter.chains(batch, taught(m, model, batch).features(TARGETS))
    for b, n, start, ids in anchors(batch):
        length = int(batch.anchor_BN[b, n]) - start
        num_valid = int(batch.valid_BNJ[b, n].sum())
        assert num_valid > 0
        features_1TF = base_features(m, model, ids[:length], TARGETS)
        fed = ids[length + 1 : length + num_valid]
        slow = slow_chain(m, drafter, ids[: length + 1], features_1TF, fed)
        torch.testing.assert_close(hidden_BNJC[b, n, :num_valid], torch.stack(slow), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_eagle_drafts_with_a_cache_are_those_without(m: Any) -> None:
    model, prompt = tiny_model(), tiny_prompt(12)
    drafter = shaken(m.eagle3.Eagle3(model, TARGETS))
    features_1TF = base_features(m, model, prompt, TARGETS)
    drafts, done = m.eagle3.Eagle3Drafts(drafter, 4), 0
    for end in (6, 7, 11):
        _, ids = drafts(DynamicCache(), prompt[: end + 1], features_1TF[:, done:end])
        slow = slow_chain(m, drafter, prompt[: end + 1], features_1TF, ids[:-1])
        assert ids == [int(model.get_output_embeddings()(state_C).argmax()) for state_C in slow]
        done = end


# Views


def run_of(m: Any, model: Any, drafts: Any, prompt: list[int], num_new: int = 32) -> Any:
    run = m.chain.decode(model, drafts, prompt, num_new, NO_END)
    assert len(run.tokens) == num_new
    return run


@pytest.mark.parametrize("floor", [True, False])
def test_a_view_drafts_here_as_in_the_engine(m: Any, floor: bool) -> None:
    dual = tiny_dual(block_size=SIZE, disturb=0.3)
    engine = Engine(EagerRunner(dual))
    accepted = 0
    for seed in range(3):
        prompt = tiny_prompt(9, seed)
        config = DecodeConfig(max_new_tokens=32, strategy="chain", floor=floor, ignore_eos=True)
        result = TokenStream(engine, engine.submit(prompt, config, eos_token_ids=NO_END)).drain()
        drafts = m.block_views.ViewDrafts(dual, SIZE, floor=floor, causal=False)
        run = run_of(m, dual.base, drafts, prompt)
        assert tuple(run.tokens) == result.token_ids
        # Near the limit the engine drafts no more than it may keep.
        full = [cycle.num_accepted for cycle in result.cycles if cycle.num_drafted == SIZE - 1 - int(floor)]
        assert len(full) >= 8
        assert run.accepted_by_cycle[: len(full)] == full
        accepted += sum(full)
    assert accepted > 0


@torch.no_grad()
def test_causal_blocks_of_training_are_those_of_decoding(m: Any) -> None:
    dual, batch = tiny_dual(block_size=SIZE, disturb=0.3), batch_of()
    training = m.block_views.CausalPass(dual, Objective())
    context, _ = training.teacher(batch)
    ids_BNJ = dual.head(training.blocks(batch, context))[:, :, :-1].argmax(-1)
    seen = set()
    for b, n, start, ids in anchors(batch):
        length = int(batch.anchor_BN[b, n]) - start
        for causal in (True, False):
            cache = DynamicCache(config=dual.base.config)
            dual.base(torch.tensor([ids[:length]]), past_key_values=cache)
            drafts = m.block_views.ViewDrafts(dual, SIZE, floor=False, causal=causal)
            decided, guessed = drafts(cache, ids[: length + 1], torch.empty(1, 0, 0))
            assert decided == []
            assert cache.get_seq_length() == length
            if causal:
                assert guessed == ids_BNJ[b, n].tolist()
            else:
                seen.add(guessed == ids_BNJ[b, n].tolist())
    # Blocks without order draft something else: the test would notice if there was no causal mask.
    assert False in seen


def test_causal_blocks_teach_all_of_the_view(m: Any) -> None:
    dual = tiny_dual(block_size=SIZE, disturb=0.2)
    m.block_views.CausalPass(dual, Objective(loss="tv"))(batch_of()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dual.view_parameters().values())


# All of them


def arm_of(m: Any, name: str, model: Any) -> tuple[Any, list[Any], Any]:
    """(Learner, parameters, maker of drafts)."""
    lessons = m.drafter_parts.Lessons(model, TARGETS)
    if name == "dflash":
        flash = m.dflash.DFlash(model, TARGETS)
        learner = m.drafter_parts.DrafterLearner(flash, lessons, Objective())
        return learner, list(flash.parameters()), lambda: m.dflash.DFlashDrafts(flash, SIZE)
    eagle = m.eagle3.Eagle3(model, TARGETS)
    learner = m.drafter_parts.DrafterLearner(eagle, lessons, Objective())
    return learner, list(eagle.parameters()), lambda: m.eagle3.Eagle3Drafts(eagle, SIZE - 1)


@pytest.mark.parametrize("name", ["dflash", "eagle3"])
def test_a_drafter_learns_and_every_text_is_the_base_s_own(m: Any, name: str) -> None:
    model = tiny_model()
    prompts = [tiny_prompt(8, seed) for seed in range(4)]
    texts = [
        stock_generate(model, prompt, max_new_tokens=32, eos_token_ids=NO_END).token_ids for prompt in prompts
    ]
    sequences = pack([Sample(tuple(p), t, "test") for p, t in zip(prompts, texts, strict=True)], 48)
    learner, parameters, make = arm_of(m, name, model)
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    before = sum(run_of(m, model, make(), prompt).accepted for prompt in prompts)
    foreseen = m.equal_loop.foreseen(learner, sequences, CONFIG, 0)
    made = m.equal_loop.learn(learner, parameters, sequences, CONFIG, 60)
    assert made["cpu_seconds"] > 0
    assert m.equal_loop.foreseen(learner, sequences, CONFIG, 0) > foreseen
    assert all(torch.equal(value, frozen[key]) for key, value in model.state_dict().items())
    runs = [run_of(m, model, make(), prompt) for prompt in prompts]
    assert [tuple(run.tokens) for run in runs] == texts
    assert sum(run.accepted for run in runs) > before + 10
    assert all(run.drafted == run.cycles * (SIZE - 1) for run in runs)


def test_all_arms_are_built_around_one_base_and_go_on_from_saved_weights(m: Any) -> None:
    batch = draw_blocks(
        pack([Sample(tuple(tiny_prompt(7)), tuple(tiny_prompt(30, 5)), "test")], 48)[:1],
        [0],
        6,
        BlockLayout(block_size=8),
    )
    sizes, counts = set(), []
    for arm in m.rival_arms.ARMS:
        base = tiny_base()
        config = arm.config(
            {"learning_rate": 1e-3} | {"mask": 60, **({"rank": 4} if arm.causal else {})}, 0, "float32"
        )
        lessons = m.drafter_parts.Lessons(base.model, m.rival_arms.targets_of(6)[0])
        built = m.rival_arms.build(arm, base, config, lessons)
        output = built.learner(0, batch)
        output.loss.backward()
        assert sum(p.grad is not None for p in built.parameters.values()) == len(built.parameters)
        counts.append(output.counts_J.tolist())
        saved = {name: p.detach() + 1.0 for name, p in built.parameters.items()}
        built.load(saved)
        assert all(torch.equal(p, saved[name]) for name, p in built.parameters.items())
        sizes.add(built.num_parameters)
        assert (built.cache_numbers == 0) == (arm.kind == "view")
        assert len(built.modes) == arm.num_modes
        for make in built.modes.values():
            drafts = make()
            run = m.chain.decode(base.model, drafts, tiny_prompt(9), 8, NO_END)
            expected = stock_generate(
                tiny_base().model, tiny_prompt(9), max_new_tokens=8, eos_token_ids=NO_END
            )
            assert tuple(run.tokens) == expected.token_ids
    assert len(sizes) == 4
    # The same positions for all.
    assert all(count == counts[0] for count in counts)


def tiny_base() -> Base:
    """Six layers, which is room for what both drafters read."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    model = random_model(config)
    return Base(
        name="tiny",
        model=model,
        tokenizer=TinyTokenizer(),  # type: ignore[arg-type]
        eos_token_ids=NO_END,
        context_length=2048,
        family=find_family(model),
        source=Source("folder", "tiny"),
    )


def test_a_run_that_is_done_is_not_done_again(
    m: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_from_file_location("trained_rivals", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "load_base", lambda *_, **__: tiny_base())
    (tmp_path / "pack").mkdir()
    samples = [
        Sample(tuple(tiny_prompt(300, seed)), tuple(tiny_prompt(250, seed + 50)), "test") for seed in range(8)
    ]
    write_pack(samples, tmp_path / "pack", bench.SHARED.sequence_length)
    (tmp_path / "more.jsonl").write_text('{"prompt": "something else", "domain": "chat"}\n')
    output = tmp_path / "out.json"
    options: dict[str, Any] = {
        "corpus": tmp_path / "pack",
        "output": output,
        "runs": tmp_path / "runs",
        "targets": 300,
        "check": 300,
        "seeds": 2,
        "prompts": [tmp_path / "more.jsonl"],
        "limit": 2,
        "num_prompts": 2,
        "max_new_tokens": 12,
        "dtype": "float32",
        "only": ["eagle3", "orthrus"],
        "quick": False,
    }
    bench.main(**options)
    report = json.loads(output.read_text())
    for arm in report["arms"].values():
        first, second = arm["trainings"]
        assert first["targets"] == report["arms"]["eagle3"]["trainings"][0]["targets"] >= 300
        assert first["loss"] != second["loss"]
        for mode in first["modes"].values():
            assert mode["near_ties"] == 0
            assert list(mode["sets"]) == ["built-in", "more"]
            assert sum(len(some) for some in mode["prompts"].values()) == 3
    assert len(report["arms"]["eagle3"]["check"]["trials"]) == 2
    assert list(report["less_ours"]) == ["eagle3"]
    assert len(report["less_ours"]["eagle3"]["7 drafts"]) == 3
    monkeypatch.setattr(bench, "learn", None)
    monkeypatch.setattr(bench, "decode", None)
    bench.main(**options)
    assert json.loads(output.read_text())["arms"] == report["arms"]
    with pytest.raises(typer.BadParameter, match="other options"):
        bench.main(**options | {"targets": 301})


def test_a_base_s_rows_are_kept_and_paid_for_by_each_arm(m: Any) -> None:
    lessons = m.drafter_parts.Lessons(tiny_model(), TARGETS)
    batch = batch_of()
    first, spared = lessons(3, batch), lessons.spared_s
    assert spared == 0.0
    assert lessons(3, batch) is first
    assert lessons.spared_s > 0.0


def test_a_text_ends_where_the_base_ends_it(m: Any) -> None:
    dual = tiny_dual(block_size=SIZE, disturb=0.3)
    prompt = tiny_prompt(9)
    every = run_of(
        m, dual.base, m.block_views.ViewDrafts(dual, SIZE, floor=True, causal=False), prompt
    ).tokens
    ends = frozenset({every[7]})
    drafts = m.block_views.ViewDrafts(dual, SIZE, floor=True, causal=False)
    run = m.chain.decode(dual.base, drafts, prompt, 32, ends)
    assert run.tokens == every[: every.index(every[7]) + 1]


def test_figures_are_those_of_the_counts(m: Any) -> None:
    clock = {"draft": 5.0, "verify": 15.0, "one_row": 10.0}
    score = m.rival_table.score_of({"a": [(10, 5, 35, 5)], "b": [(6, 3, 21, 3)]}, clock)
    assert score["all"]["tokens_per_cycle"] == 2.0
    assert score["all"]["accepted_per_cycle"] == 1.0
    assert score["sets"]["b"]["acceptance_rate"] == pytest.approx(1 / 7)
    assert score["cycle_cost"] == 2.0
    assert score["tokens_per_base_pass"] == 1.0
    assert m.rival_table.difference([(10, 5, 0, 0)] * 3, [(10, 10, 0, 0)] * 3) == [1.0, 1.0, 1.0]
    training = {
        "modes": {"7 drafts": score},
        "trained_parameters": 2_000_000,
        "cpu_seconds": 12.0,
        "own_cache_numbers_per_token": 0,
    }
    text = m.rival_table.table({"x": {"label": "an arm", "trainings": [training]}})
    assert (
        "| an arm | 7 drafts | 1.00 | 2.00 | 2.000 | 2.00 | 2.00 | 0.50 | 2.00 | 1.00 | 2.0 M | 12 | no |"
        in text
    )


def test_where_two_texts_part_the_gap_is_that_of_the_two_best_logits(m: Any) -> None:
    model, prompt = tiny_model(), tiny_prompt(9)
    best_2 = model(torch.tensor([[*prompt, 5]])).logits[0, -1].topk(2).values
    assert m.chain.first_gap(model, prompt, [5, 6, 7], [5, 9, 7]) == pytest.approx(
        float(best_2[0] - best_2[1])
    )
    assert m.chain.first_gap(model, prompt, [5, 6], [5, 6, 7]) == float("inf")
