"""Kernels refuse what they cannot read, whoever calls them: no dtype, size, stride or id crashes them.

Each call either raises or answers; what it reads beyond its tensors shows under an address sanitizer.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import FewRowsLinear
from orthrus.model.int4_linear import Int4Linear
from orthrus.model.int8_linear import Int8Linear

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64),
]
KINDS = ["float32", "bfloat16", "int8", "int4"]


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


def packed(kind: str, outputs: int = 70, inputs: int = 64) -> FewRowsLinear:
    torch.manual_seed(0)
    of: dict[str, Any] = {"int8": Int8Linear, "int4": Int4Linear}
    slow = nn.Linear(inputs, outputs, bias=kind in ("float32", "bfloat16"))
    if kind in of:
        return FewRowsLinear.of([of[kind].of(slow)])
    return FewRowsLinear.of([slow.to(getattr(torch, kind))])


def arguments(kind: str) -> list[Any]:
    """Of `few_rows_linear`, as they should be."""
    ours = packed(kind)
    x = torch.randn(3, 64, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    return [x, ours.weight, ours.scales, ours.kernel_bias, 70]


def twin_arguments(kind: str) -> list[Any]:
    x, weight, scales, bias, columns = arguments(kind)
    return [x[None], 1, weight, scales, bias, weight.clone(), scales, bias, columns]


def pair_arguments() -> list[Any]:
    rows, parents, children = torch.randn(5, 6), torch.randn(20, 6), torch.randn(20, 6)
    parent_ids, child_ids = torch.randint(0, 20, (5, 4)), torch.randint(0, 20, (5, 3))
    return [rows, parents, children, parent_ids, child_ids, torch.randn(5, 3), torch.randn(5, 1), 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_dtype_are_refused(kind: str, dtype: torch.dtype) -> None:
    given, twin = arguments(kind), twin_arguments(kind)
    if dtype == given[0].dtype:
        return
    given[0], twin[0] = given[0].to(dtype), twin[0].to(dtype)
    with pytest.raises(RuntimeError, match="times a weight that takes"):
        torch.ops.orthrus.few_rows_linear(*given)
    with pytest.raises(RuntimeError, match="times a weight that takes"):
        torch.ops.orthrus.few_rows_twin_linear(*twin)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_packed_is_refused(kind: str) -> None:
    given = arguments(kind)
    weight = given[1]
    others = [
        weight.flatten(),
        weight.flatten(0, 1),
        weight[..., None],
        weight[:0],
        weight[:, :0],
        weight.transpose(0, 1),
        weight[:, ::2],
        *(weight.to(dtype) for dtype in DTYPES if dtype != weight.dtype),
    ]
    for other in others:
        with pytest.raises(RuntimeError):
            torch.ops.orthrus.few_rows_linear(given[0], other, *given[2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [2, 3], ids=["scales", "bias"])
def test_scales_and_bias_with_gaps_or_of_another_dtype_are_refused(kind: str, place: int) -> None:
    given = arguments(kind)
    if given[place] is None:
        return
    room = given[place].numel()
    for other in (
        torch.ones(1).expand(room),
        torch.ones(2 * room)[::2],
        given[place][:-1],
        given[place].bfloat16(),
        given[place].double(),
    ):
        given[place] = other
        with pytest.raises(RuntimeError, match="scales and bias must be filled up"):
            torch.ops.orthrus.few_rows_linear(*given)


@pytest.mark.parametrize("columns", [-1, 71 * 50, 2**62])
def test_outputs_that_the_weight_has_not_are_refused(columns: int) -> None:
    with pytest.raises(RuntimeError, match="outputs that do not fit"):
        torch.ops.orthrus.few_rows_linear(*arguments("float32")[:-1], columns)


@pytest.mark.parametrize("num", [-1, 4, 2**62])
def test_a_twin_has_no_more_rows_than_there_are(num: int) -> None:
    given = twin_arguments("float32")
    given[1] = num
    with pytest.raises(RuntimeError, match="one sequence only"):
        torch.ops.orthrus.few_rows_twin_linear(*given)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_with_gaps_are_those_rows(kind: str) -> None:
    given = arguments(kind)
    expected = torch.ops.orthrus.few_rows_linear(*given)
    wide = torch.randn(3, 2, 64).to(given[0].dtype)
    wide[:, 1] = given[0]
    for x in (wide[:, 1], given[0].T.contiguous().T, given[0].repeat(1, 2)[:, :64]):
        assert torch.equal(torch.ops.orthrus.few_rows_linear(x, *given[1:]), expected)
    same = given[0][:1].expand(3, 64)
    assert torch.equal(torch.ops.orthrus.few_rows_linear(same, *given[1:]), expected[:1].expand(3, 70))


@pytest.mark.parametrize("place", [3, 4], ids=["parents", "children"])
@pytest.mark.parametrize("wrong", [20, -1, 5000, 2**62, -(2**62)])
def test_pairs_of_ids_out_of_range_are_refused(place: int, wrong: int) -> None:
    given = pair_arguments()
    given[place][4, 2] = wrong
    with pytest.raises(RuntimeError, match=f"id {wrong} of 20"):
        torch.ops.orthrus.pair_log_probs(*given)


@pytest.mark.parametrize("place", range(7))
def test_pairs_of_another_dtype_or_shape_are_refused(place: int) -> None:
    for dtype in DTYPES:
        given = pair_arguments()
        if given[place].dtype == dtype:
            continue
        given[place] = given[place].to(dtype)
        with pytest.raises(RuntimeError, match="pair_log_probs"):
            torch.ops.orthrus.pair_log_probs(*given)
    for change in (
        lambda t: t[:-1],
        lambda t: t[:0],
        lambda t: t.repeat(1, 2),
        lambda t: t[0],
        lambda t: t[None],
    ):
        given = pair_arguments()
        given[place] = change(given[place])
        if place in (1, 2) and given[place].shape[1:] == (6,) and len(given[place]) == 19:
            # A table may end early, where no id says otherwise.
            given[3] %= 19
            given[4] %= 19
            torch.ops.orthrus.pair_log_probs(*given)
        elif place != 6 or given[place].numel() != 5:
            shrinks = place == 3 and given[place].shape == (5, 8)
            if shrinks:
                assert torch.ops.orthrus.pair_log_probs(*given).shape == (5, 8, 3)
                continue
            with pytest.raises((RuntimeError, IndexError)):
                torch.ops.orthrus.pair_log_probs(*given)


@torch.inference_mode()
def test_pairs_of_tensors_with_gaps_are_those_pairs() -> None:
    given = pair_arguments()
    expected = torch.ops.orthrus.pair_log_probs(*given)
    for place in (0, 3, 4, 5, 6):
        moved = list(given)
        moved[place] = given[place].T.contiguous().T
        assert torch.equal(torch.ops.orthrus.pair_log_probs(*moved), expected)
        moved[place] = given[place].repeat_interleave(2, 0)[::2]
        assert torch.equal(torch.ops.orthrus.pair_log_probs(*moved), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 40).to(dtype)
    if dtype != torch.float32:
        with pytest.raises(RuntimeError, match="best_tokens"):
            torch.ops.orthrus.best_tokens(scores, 2)
    if dtype not in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match="first_best"):
            torch.ops.orthrus.first_best(scores)


@pytest.mark.parametrize("num", [0, -1, 41, 2**62])
def test_more_best_tokens_than_there_are_are_refused(num: int) -> None:
    with pytest.raises(RuntimeError, match="best_tokens"):
        torch.ops.orthrus.best_tokens(torch.randn(3, 40), num)


@torch.inference_mode()
def test_scores_with_gaps_are_those_scores() -> None:
    scores = torch.randn(40, 300)
    for each in (scores.T, scores[:, ::3], scores[:1].expand(4, 300), scores[::2]):
        for mine, theirs in zip(
            torch.ops.orthrus.best_tokens(each, 5),
            torch.ops.orthrus.best_tokens(each.clone(memory_format=torch.contiguous_format), 5),
            strict=True,
        ):
            assert torch.equal(mine, theirs)
        assert torch.equal(torch.ops.orthrus.first_best(each), each.argmax(1))


def mangled(value: Any, draw: random.Random) -> Any:
    """The same with another dtype, shape or stride, or other values."""
    if not isinstance(value, Tensor):
        return draw.choice([value, 0, -1, 1, 7, 10**6, 2**40])
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.to(draw.choice(DTYPES)),
        lambda t: t[..., : draw.randrange(t.shape[-1] + 1)] if t.ndim else t,
        lambda t: t[: draw.randrange(t.shape[0] + 1)] if t.ndim else t,
        lambda t: t.transpose(0, -1) if t.ndim > 1 else t,
        lambda t: t[..., ::2] if t.ndim else t,
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t[:1].expand(9, *t.shape[1:]) if t.ndim and len(t) else t,
        lambda t: t.flip(0) if t.ndim else t,
        lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t,
        lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else t,
        lambda t: t + draw.choice([-100, 100, 10**9]) if t.dtype == torch.int64 else t,
        lambda t: t.new_empty(0),
        lambda t: t.new_zeros(()),
    ]
    return draw.choice(changes)(value)


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.parametrize("seed", range(8))
@torch.inference_mode()
def test_no_input_crashes(seed: int) -> None:
    """Raised or answered, each of two thousand."""
    draw = random.Random(seed)
    ops = torch.ops.orthrus
    answered = 0
    for _ in range(250):
        kind = draw.choice(KINDS)
        op, given = draw.choice(
            [
                (ops.few_rows_linear, arguments(kind)),
                (ops.few_rows_twin_linear, twin_arguments(kind)),
                (ops.pair_log_probs, pair_arguments()),
                (ops.best_tokens, [torch.randn(3, 300), 5]),
                (ops.first_best, [torch.randn(3, 300)]),
            ]
        )
        for _ in range(draw.randrange(3)):
            place = draw.randrange(len(given))
            given[place] = mangled(given[place], draw)
        try:
            op(*given)
            answered += 1
        except (RuntimeError, IndexError):
            continue
    assert 50 < answered < 250
