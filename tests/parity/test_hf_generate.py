"""OrthrusForCausalLM.generate gives what the stock model's `generate` gives, argument for argument."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.folders import letter_tokenizer, save_base
from tests.tiny import VOCAB, disturb_view, tiny_prompt
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, TextStreamer

from orthrus.errors import UserInputError
from orthrus.hf.auto import OrthrusForCausalLM
from orthrus.hf.generate import OrthrusGenerateOutput

LENGTHS = (4, 15, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OrthrusForCausalLM:
    folder = save_base(tmp_path_factory.mktemp("base") / "tiny")
    loaded = OrthrusForCausalLM.from_pretrained(folder, view="untrained")
    disturb_view(loaded.dual, 0.1)
    return loaded


@pytest.fixture(autouse=True)
def _own_generation_config(model: OrthrusForCausalLM) -> Iterator[None]:
    before = model.generation_config.to_dict()
    yield
    for name, value in before.items():
        setattr(model.generation_config, name, value)


def stock(model: OrthrusForCausalLM, *args: Any, **kwargs: Any) -> Tensor:
    base = model.dual.stock()
    assert base.generation_config is model.generation_config
    return base.generate(*args, **kwargs)


def prompts(side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of several lengths, padded with id 0."""
    ids_BT = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, length in enumerate(LENGTHS):
        where = slice(-length, None) if side == "left" else slice(length)
        ids_BT[row, where] = torch.tensor(tiny_prompt(length, seed=row))
        mask_BT[row, where] = 1
    return ids_BT, mask_BT


IDS_1T = torch.tensor([tiny_prompt(9)])


def test_one_prompt_and_drafts_that_hit(model: OrthrusForCausalLM) -> None:
    out = model.generate(IDS_1T, max_new_tokens=40, eos_token_id=None, return_dict_in_generate=True)
    assert isinstance(out, OrthrusGenerateOutput)
    assert torch.equal(out.sequences, stock(model, IDS_1T, max_new_tokens=40, eos_token_id=None))
    (stats,) = out.stats
    assert stats.num_tokens == 40
    assert 0 < stats.num_accepted < stats.num_drafted


@pytest.mark.parametrize(
    "ours",
    [
        {"strategy": "ar"},
        {"block_size": 3},
        {"floor": False},
        {"strategy": "tree", "node_budget": 5},
        {"strategy": "fused", "block_budget": 1},
        {"strategy": "fused_tree"},
    ],
    ids=str,
)
def test_our_own_options_change_no_token(model: OrthrusForCausalLM, ours: dict[str, Any]) -> None:
    out = model.generate(IDS_1T, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True, **ours)
    assert torch.equal(out.sequences, stock(model, IDS_1T, max_new_tokens=30, eos_token_id=None))
    assert (out.stats[0].num_drafted > 0) == (ours.get("strategy") != "ar")


def test_padding_mask_and_batch_are_honoured(model: OrthrusForCausalLM) -> None:
    """The official code fails on a batch, and drops the padding mask."""
    ids_BT, mask_BT = prompts()
    expected = stock(model, ids_BT, attention_mask=mask_BT, max_new_tokens=30, eos_token_id=None)
    ours = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=30, eos_token_id=None)
    assert torch.equal(ours, expected)
    assert not torch.equal(model.generate(ids_BT, max_new_tokens=30, pad_token_id=VOCAB - 2), expected)


def test_padding_is_inferred_as_stock_does(model: OrthrusForCausalLM) -> None:
    ids_BT, _ = prompts()
    expected = stock(model, ids_BT, max_new_tokens=20, pad_token_id=0, eos_token_id=2)
    assert torch.equal(model.generate(ids_BT, max_new_tokens=20, pad_token_id=0, eos_token_id=2), expected)


def test_padding_on_the_right_is_skipped_too(model: OrthrusForCausalLM) -> None:
    """Each row continues its own last token; the new tokens stand behind the padding."""
    ids_BT, mask_BT = prompts("right")
    out_BT = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(out_BT[:, : max(LENGTHS)], ids_BT)
    for row, length in enumerate(LENGTHS):
        alone = stock(model, ids_BT[row : row + 1, :length], max_new_tokens=20, eos_token_id=None)
        assert torch.equal(out_BT[row, max(LENGTHS) :], alone[0, length:])


def free_tokens(model: OrthrusForCausalLM) -> list[int]:
    out: Tensor = stock(model, IDS_1T, max_new_tokens=30, eos_token_id=None)
    return out[0, IDS_1T.shape[1] :].tolist()


def test_eos_as_an_int_a_list_or_a_tensor(model: OrthrusForCausalLM) -> None:
    """The official code crashes on a list."""
    text = free_tokens(model)
    some = sorted({*text[4:]} - {*text[:4]})
    assert some
    for eos in (some[0], some, torch.tensor(some), [VOCAB - 2, some[-1]]):
        expected = stock(model, IDS_1T, max_new_tokens=30, eos_token_id=eos)
        assert expected.shape[1] < IDS_1T.shape[1] + 30
        assert torch.equal(model.generate(IDS_1T, max_new_tokens=30, eos_token_id=eos), expected)


def test_a_missing_eos_never_stops(model: OrthrusForCausalLM) -> None:
    """The official code crashes without one."""
    model.generation_config.eos_token_id = None
    assert model.generate(IDS_1T, max_new_tokens=30)[0, IDS_1T.shape[1] :].tolist() == free_tokens(model)


def test_eos_id_0_stops(model: OrthrusForCausalLM) -> None:
    """The official code takes 0 for "none". Swapping two head rows makes the model say 0."""
    text = free_tokens(model)
    head = model.get_output_embeddings().weight
    spoken = next(t for t in text[5:] if t not in text[:5])
    with torch.no_grad():
        swapped = head[[spoken, 0]].clone()
        head[0], head[spoken] = swapped
    try:
        expected = stock(model, IDS_1T, max_new_tokens=30, eos_token_id=0)
        assert 0 in expected[0]
        assert expected.shape[1] < IDS_1T.shape[1] + 30
        assert torch.equal(model.generate(IDS_1T, max_new_tokens=30, eos_token_id=0), expected)
    finally:
        with torch.no_grad():
            head[spoken], head[0] = swapped


def test_rows_that_end_early_are_padded_as_stock_pads_them(model: OrthrusForCausalLM) -> None:
    """With pad_token_id; and without one, with the first of the end-of-sequence ids as they are listed."""
    ids_BT, mask_BT = prompts()
    free_BT = stock(model, ids_BT, attention_mask=mask_BT, max_new_tokens=30, eos_token_id=None)
    early = int(free_BT[1, max(LENGTHS) + 2])
    assert early not in free_BT[0, max(LENGTHS) : max(LENGTHS) + 6]
    for pad in (0, None):
        model.generation_config.pad_token_id = pad
        options = {"max_new_tokens": 12, "eos_token_id": [VOCAB - 2, early]}
        expected = stock(model, ids_BT, attention_mask=mask_BT, **options)
        assert (expected[1, -2:] == (VOCAB - 2 if pad is None else 0)).all()
        assert torch.equal(model.generate(ids_BT, attention_mask=mask_BT, **options), expected)


def test_max_length_counts_the_prompt(model: OrthrusForCausalLM) -> None:
    out = model.generate(IDS_1T, max_length=17, eos_token_id=None)
    assert out.shape[1] == 17
    assert torch.equal(out, stock(model, IDS_1T, max_length=17, eos_token_id=None))


def test_max_length_counts_padding_too(model: OrthrusForCausalLM) -> None:
    ids_BT, mask_BT = prompts()
    options: dict[str, Any] = {"attention_mask": mask_BT, "max_length": 20, "eos_token_id": None}
    assert torch.equal(model.generate(ids_BT, **options), stock(model, ids_BT, **options))


def test_max_new_tokens_wins_over_max_length(model: OrthrusForCausalLM) -> None:
    """In the official code it is the other way round."""
    assert model.generate(IDS_1T, max_new_tokens=5, max_length=100, eos_token_id=None).shape[1] == 9 + 5


@pytest.mark.parametrize("max_length", [8, 9])
def test_a_max_length_within_the_prompt_is_refused(model: OrthrusForCausalLM, max_length: int) -> None:
    with pytest.raises(UserInputError, match=f"max_length {max_length} leaves no room behind the input of 9"):
        model.generate(IDS_1T, max_length=max_length)


# The stock model recommends to name a limit.
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_neither_limit_means_20_new_tokens_as_in_transformers(model: OrthrusForCausalLM) -> None:
    out = model.generate(IDS_1T, eos_token_id=None)
    assert out.shape[1] == 9 + 20
    assert torch.equal(out, stock(model, IDS_1T, eos_token_id=None))


def test_a_given_config_takes_what_it_leaves_open_from_the_models_own(model: OrthrusForCausalLM) -> None:
    text = free_tokens(model)
    model.generation_config.eos_token_id = next(t for t in text[5:] if t not in text[:5])
    config = GenerationConfig(max_new_tokens=30)
    out = model.generate(IDS_1T, generation_config=config)
    assert out.shape[1] < 9 + 30
    assert torch.equal(out, stock(model, IDS_1T, generation_config=config))


class Puts(TextStreamer):
    def __init__(self) -> None:
        super().__init__(letter_tokenizer(), skip_prompt=True)  # type: ignore[arg-type]
        self.shapes: list[tuple[int, ...]] = []
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        self.shapes.append(tuple(value.shape))
        self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def test_a_text_streamer_sees_the_prompt_then_every_cycle(model: OrthrusForCausalLM) -> None:
    streamer = Puts()
    out = model.generate(IDS_1T, max_new_tokens=30, eos_token_id=None, streamer=streamer)
    assert streamer.ids == out[0].tolist()
    assert streamer.shapes[0] == (1, 9)
    assert len(streamer.shapes) < 30
    assert streamer.text.rstrip("\n") == letter_tokenizer().decode(out[0, 9:].tolist())


def test_a_streamer_follows_one_sequence_only(model: OrthrusForCausalLM) -> None:
    with pytest.raises(UserInputError, match="batch of one"):
        model.generate(IDS_1T.repeat(2, 1), streamer=Puts())


def test_stopping_criteria_are_asked_after_every_token(model: OrthrusForCausalLM) -> None:
    seen: list[int] = []

    def thirteen(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        seen.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] >= 13])

    out = model.generate(IDS_1T, max_new_tokens=30, eos_token_id=None, stopping_criteria=[thirteen])
    assert seen == [10, 11, 12, 13]
    expected = stock(model, IDS_1T, max_new_tokens=30, eos_token_id=None, stopping_criteria=[thirteen])
    assert torch.equal(out, expected)


class Until(StoppingCriteria):
    """Keeps a state for each sequence of the batch, as evaluation harnesses do."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids, self.done = token_ids, [False] * len(token_ids)
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        for i, wanted in enumerate(self.token_ids):
            self.done[i] |= int(input_ids[i, -1]) == wanted
        return torch.tensor(self.done)


@pytest.mark.parametrize("strategy", ["ar", "tree", "auto"])
@pytest.mark.parametrize("eos", [None, 2])
def test_criteria_see_the_whole_batch_at_every_length(
    model: OrthrusForCausalLM, strategy: str, eos: int | None
) -> None:
    ids_BT, mask_BT = prompts()
    options: dict[str, Any] = {"attention_mask": mask_BT, "max_new_tokens": 20, "eos_token_id": eos}
    options |= {"do_sample": False, "pad_token_id": 0}
    free_BT = stock(model, ids_BT, **options)[:, ids_BT.shape[1] :]
    wanted = [int(free_BT[i, at]) for i, at in enumerate((4, 11, 7))]
    ours, theirs = Until(wanted), Until(wanted)
    out = model.generate(ids_BT, stopping_criteria=[ours], strategy=strategy, **options)
    expected = stock(model, ids_BT, stopping_criteria=[theirs], **options)
    assert torch.equal(out, expected)
    assert ours.seen == theirs.seen


def test_the_counters_leave_out_what_a_criterion_dropped(model: OrthrusForCausalLM) -> None:
    ids_BT, mask_BT = prompts()
    free_BT = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=20)[:, ids_BT.shape[1] :]
    until = Until([int(free_BT[i, 5]) for i in range(3)])
    out = model.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=20, stopping_criteria=[until],
        return_dict_in_generate=True, eos_token_id=60,
    )  # fmt: skip
    assert isinstance(out, OrthrusGenerateOutput)
    for i, stats in enumerate(out.stats):
        assert stats.num_tokens == 1 + free_BT[i].tolist().index(until.token_ids[i])


@pytest.mark.parametrize("name", ["prefix_allowed_tokens_fn", "assistant_model", "past_key_values"])
def test_options_of_transformers_that_we_lack_are_called_by_their_name(
    model: OrthrusForCausalLM, name: str
) -> None:
    model.generate(IDS_1T, max_new_tokens=1, **{name: None})
    with pytest.raises(UserInputError, match=f"{name} is not supported by Orthrus yet"):
        model.generate(IDS_1T, max_new_tokens=1, **{name: lambda *_: [1]})


def test_stop_strings_of_a_batch_end_where_stock_ends(model: OrthrusForCausalLM) -> None:
    tokenizer = letter_tokenizer()
    ids_BT, mask_BT = prompts()
    free_BT = stock(model, ids_BT, attention_mask=mask_BT, max_new_tokens=20, eos_token_id=None)
    stop = [tokenizer.decode(free_BT[i, 15 + at : 17 + at]) for i, at in enumerate((3, 9, 6))]
    options: dict[str, Any] = {"attention_mask": mask_BT, "max_new_tokens": 20, "tokenizer": tokenizer}
    for eos in (None, 2):
        options |= {"eos_token_id": eos, "stop_strings": [*stop, "</s>"]}
        assert torch.equal(model.generate(ids_BT, **options), stock(model, ids_BT, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"inputs": [[1, 2]]}, {"inputs": "text"}, {"inputs": IDS_1T, "attention_mask": [[1]]},
        {"inputs": IDS_1T, "stop_strings": [3], "tokenizer": letter_tokenizer()}, {"inputs": IDS_1T.bool()},
        {"inputs": IDS_1T, "generation_config": {"max_new_tokens": 3}}, {"inputs": IDS_1T, "streamer": 5},
        {"inputs": IDS_1T, "stopping_criteria": 5}, {"inputs": IDS_1T, "num_return_sequences": "two"},
        {"inputs": IDS_1T, "max_new_tokens": "ten"}, {"inputs": IDS_1T, "eos_token_id": "two"},
        {"inputs": IDS_1T, "max_length": 1.5}, {"inputs": IDS_1T, "max_time": "now"},
        {"inputs": IDS_1T, "pad_token_id": "x"}, {"inputs": IDS_1T, "num_return_sequences": -1},
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_are_one_sentence(model: OrthrusForCausalLM, options: dict[str, Any]) -> None:
    with pytest.raises(UserInputError, match=r"\.$"):
        model.generate(**options)


def test_stop_strings_end_where_stock_ends(model: OrthrusForCausalLM) -> None:
    tokenizer = letter_tokenizer()
    stop = tokenizer.decode(free_tokens(model))[6:9]
    options = {"max_new_tokens": 30, "eos_token_id": None, "stop_strings": [stop], "tokenizer": tokenizer}
    assert torch.equal(model.generate(IDS_1T, **options), stock(model, IDS_1T, **options))


def test_sampling_follows_torchs_seed(model: OrthrusForCausalLM) -> None:
    def text(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
        return model.generate(IDS_1T, max_new_tokens=12, eos_token_id=None, **options).tolist()

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert len({tuple(row) for row in text(1)}) == 3


def test_without_do_sample_a_temperature_means_nothing(model: OrthrusForCausalLM) -> None:
    options = {"max_new_tokens": 12, "eos_token_id": None}
    assert torch.equal(
        model.generate(IDS_1T, temperature=5.0, do_sample=False, **options), stock(model, IDS_1T, **options)
    )


def test_copies_of_one_greedy_text_are_refused(model: OrthrusForCausalLM) -> None:
    with pytest.raises(UserInputError, match="num_return_sequences"):
        model.generate(IDS_1T, num_return_sequences=2)


UNSUPPORTED = {
    "num_beams": 2, "sequence_bias": [[[3, 4], 1.0]], "no_repeat_ngram_size": 2, "bad_words_ids": [[3]],
    "min_new_tokens": 3, "min_length": 3, "suppress_tokens": [3], "typical_p": 0.9, "guidance_scale": 1.5,
    "output_scores": True, "output_logits": True, "epsilon_cutoff": 0.1, "penalty_alpha": 0.5,
    "prompt_lookup_num_tokens": 2, "encoder_no_repeat_ngram_size": 2, "token_healing": True,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED.items())
def test_what_cannot_be_honoured_is_refused_by_name(model: OrthrusForCausalLM, name: str, value: Any) -> None:
    with pytest.raises(UserInputError, match=name):
        model.generate(IDS_1T, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": IDS_1T, "max_new_tokns": 3}, "max_new_tokns"),
        ({"inputs": IDS_1T, "logits_processor": [lambda *_: None]}, "logits_processor"),
        ({}, "needs input_ids"),
        ({"inputs": IDS_1T, "input_ids": IDS_1T}, "needs input_ids, once"),
        ({"inputs": IDS_1T[0]}, r"must be a \(batch, length\)"),
        ({"inputs": IDS_1T.float()}, r"must be a \(batch, length\)"),
        ({"inputs": IDS_1T, "attention_mask": torch.ones(1, 4)}, "attention_mask has shape"),
        ({"inputs": IDS_1T, "attention_mask": torch.zeros(1, 9)}, "prompt is empty"),
        ({"inputs": IDS_1T, "block_size": 1}, "at least 2"),
        ({"inputs": IDS_1T, "strategy": "beam"}, "strategy must be one of"),
        ({"inputs": IDS_1T, "node_budget": 0}, "node_budget must be at least 1"),
        ({"inputs": IDS_1T, "block_budget": 0}, "block_budget must be at least 1"),
        ({"inputs": IDS_1T, "repetition_penalty": -1.0}, "repetition_penalty"),
        ({"inputs": IDS_1T, "sequence_bias": {5: 1.0}}, "sequence_bias is malformed"),
        ({"inputs": IDS_1T, "sequence_bias": [[[5], -math.inf]]}, "logit_bias of token 5 must be"),
        ({"inputs": IDS_1T, "sequence_bias": [[[VOCAB], 1.0]]}, f"ids end at {VOCAB - 1}"),
        ({"inputs": IDS_1T, "stop_strings": ["x"]}, "need a tokenizer"),
    ],
)
def test_wrong_arguments_get_one_sentence(model: OrthrusForCausalLM, arguments: Any, message: str) -> None:
    with pytest.raises(UserInputError, match=message) as caught:
        model.generate(**arguments)
    assert "\n" not in str(caught.value)


def test_forward_is_the_base_models_own(model: OrthrusForCausalLM, tmp_path: Path) -> None:
    base = model.dual.stock()
    with torch.inference_mode():
        assert torch.equal(model(IDS_1T).logits, base(IDS_1T).logits)
