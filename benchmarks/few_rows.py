"""Our kernels for few rows beside PyTorch's, on the default model's shapes: python benchmarks/few_rows.py

All contestants take turns in one run. A linear is all products of a decoder, each with weights of its
own, so that they come from memory as in a pass; attention is that of all layers to a history.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.statistics import Spread
from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import fast_linear
from orthrus.model.int8_linear import Int8Linear
from orthrus.model.passes import causal, join
from orthrus.model.pool import SlotPool, Slots, pages_for, transposed

ROWS = (1, 4, 8, 16, 25, 32, 48)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
# Outputs and inputs of a layer's products, projections of the same input joined.
PRODUCTS = ((960, 576), (576, 576), (3072, 576), (576, 1536))
NUM_LAYERS, HEADS, KV_HEADS, SIZE = 30, 9, 3, 64

LEGEND = {
    "pytorch_ms": "nn.Linear (bfloat16: packed for oneDNN where it takes it; int8: orthrus' Int8Linear, by "
    "oneDNN where that sums exactly) or scaled_dot_product_attention with the heads of a group folded; "
    "median (min..max) over repeats",
    "ours_ms": "the same by kernels",
    "ratio": "pytorch_ms / ours_ms, repeat by repeat; median",
}


class Packed(nn.Module):
    """A bfloat16 linear as PyTorch packs it for oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")  # type: ignore[no-any-return]


Job = Callable[[], None]


def linears(dtype: str) -> Callable[[int], tuple[Job, Job]]:
    """All products of all layers; the answer makes PyTorch's job and ours for a number of rows."""
    plain = [
        nn.Linear(inputs, outputs, bias=False, dtype=DTYPES[dtype])
        for _ in range(NUM_LAYERS)
        for outputs, inputs in PRODUCTS
    ]
    theirs: list[nn.Module] = list(plain)
    if dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        theirs = [Packed(linear) for linear in plain]
    if dtype == "int8":
        theirs = [Int8Linear.of(linear) for linear in plain]
    ours = [
        fast_linear([linear if dtype != "int8" else their])
        for linear, their in zip(plain, theirs, strict=True)
    ]

    def jobs(num_rows: int) -> tuple[Job, Job]:
        inputs = [torch.randn(num_rows, linear.in_features, dtype=DTYPES[dtype]) for linear in plain[:4]]

        def all_of(modules: list[Any]) -> Job:
            return lambda: [m(inputs[i % 4]) for i, m in enumerate(modules)] and None

        return all_of(theirs), all_of(ours)

    return jobs


def attention(dtype: str, history: int) -> Callable[[int], tuple[Job, Job]]:
    """That of all layers, each with keys and values of its own."""
    kind, fold = DTYPES[dtype], HEADS // KV_HEADS
    config = LlamaConfig(
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=NUM_LAYERS,
    )
    pool = SlotPool(config, pages_for(history + max(ROWS)), dtype=kind)
    for store in (*pool.keys, *pool.values):
        store.normal_()
    transposed_keys = list(map(transposed, pool.keys))
    slots = Slots(pool)
    slots.reserve(pool.num_slots)
    slots.commit(history)

    def jobs(num_rows: int) -> tuple[Job, Job]:
        end = history + num_rows
        query = torch.randn(1, num_rows, HEADS, SIZE, dtype=kind).transpose(1, 2)
        folded = query.unflatten(1, (KV_HEADS, fold)).transpose(2, 3).flatten(2, 3)
        visible = torch.ones(num_rows, end, dtype=torch.bool).tril(history)
        mask = torch.zeros(num_rows, end, dtype=kind).masked_fill(~visible, -torch.inf)
        mask = mask.repeat_interleave(fold, 0)
        plan = join([(causal([0] * num_rows), slots)]).plan_P
        stores = list(zip(pool.keys, transposed_keys, pool.values, strict=True))
        theirs, ours = scaled_dot_product_attention, torch.ops.orthrus.paged_attention
        return (
            lambda: [theirs(folded, k[:, :, :end], v[:, :, :end], mask) for k, _, v in stores] and None,
            lambda: [ours(query, k, v, plan, SIZE**-0.5, 0, 0.0) for _, k, v in stores] and None,
        )

    return jobs


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    history: Annotated[int, typer.Option(min=1, help="Tokens that attention reads.")] = 256,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table, keep the result."""
    load_kernels()
    torch.manual_seed(0)
    kinds = {f"linears, {dtype}": linears(dtype) for dtype in DTYPES}
    kinds |= {f"attention, {dtype}": attention(dtype, history) for dtype in ("float32", "bfloat16")}
    times: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for name, make in kinds.items():
                for num_rows in ROWS:
                    both = times.setdefault((name, num_rows), ([], []))
                    for job, found in zip(make(num_rows), both, strict=True):
                        started = perf_counter()
                        job()
                        found.append((perf_counter() - started) * 1e3)
    rows = []
    for (name, num_rows), both in times.items():
        # The first round warms up.
        theirs, ours = (found[1:] for found in both)
        ratio = median(a / b for a, b in zip(theirs, ours, strict=True))
        spreads = {"pytorch_ms": asdict(Spread.of(theirs)), "ours_ms": asdict(Spread.of(ours))}
        rows.append({"what": name, "rows": num_rows, **spreads, "ratio": ratio})
    report = {
        "kind": "few_rows",
        "provenance": provenance(device="cpu", dtype=", ".join(DTYPES), seed=0),
        "legend": LEGEND,
        "options": {"history": history, "repeats": repeats},
        "results": rows,
    }
    path = output or Path(__file__).parent / "results" / "few-rows-cpu.json"
    write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    typer.echo(to_markdown(rows))


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each kind, PyTorch's time / ours by rows."""
    names = list(dict.fromkeys(row["what"] for row in rows))
    table = []
    for name in names:
        cells = [
            f"{row['pytorch_ms']['median']:.1f} / {row['ours_ms']['median']:.1f} = {row['ratio']:.2f}"
            for row in rows
            if row["what"] == name
        ]
        table.append([name, *cells])
    return markdown_table(["PyTorch ms / ours ms", *(f"{n} rows" for n in ROWS)], table)


if __name__ == "__main__":
    typer.run(main)
