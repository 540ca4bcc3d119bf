"""What becomes of a view when its base changes: python benchmarks/life_of_a_view.py OUT.json [--help]

The shipped view drafts for its base in four precisions, then for the base with a LoRA merged in, and then `orthrus
adapt` re-tunes it on that. The LoRA is trained here: it makes the base answer a shop's requests in another style.
Counts passes and reads no clock, so it may run beside other work. A part that is done is not done again.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from adapting import adapt, narrow_log

from orthrus.api import Orthrus
from orthrus.base.bench_prompts import load_prompts
from orthrus.base.loading import load_base
from orthrus.base.outputs import check_report, write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.records import output_digest

DTYPES = ("float32", "bfloat16", "int8", "int4")
LEGEND = {
    "tokens_per_cycle": "(tokens - 1) / cycles, pooled over prompts; chain, greedy; the AR view's own tokens included",
    "accepted_per_cycle": "accepted drafts / cycles, pooled",
    "to_float32": "tokens_per_cycle / that in float32, same prompts",
    "changed": "share of the requests held back whose greedy text the LoRA changes",
    "won_back": "tokens per cycle on the LoRA's base / those of the shipped view on its own base, same requests",
}


def main(
    output: Annotated[Path, typer.Argument(help="JSON file to write, and to go on with.")],
    work: Annotated[Path, typer.Option(help="Where the LoRA and the views go.")] = Path("runs/life"),
    limit: Annotated[int, typer.Option(min=1, help="Built-in prompts of each domain.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 96,
    requests: Annotated[int, typer.Option(min=25, help="Of the shop; a fifth is held back.")] = 200,
    epochs: Annotated[
        list[float] | None, typer.Option(help="Of adapt; may be repeated. Left out: 1, 3.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of requests and training.")] = 0,
) -> None:
    """Measure part by part."""
    check_report(output)
    work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    options = {"limit": limit, "max_new_tokens": max_new_tokens, "requests": requests, "seed": seed}
    if report and report["options"] != options:
        raise typer.BadParameter(f"{output} holds results of other options; name a new file")
    report |= {"kind": "orthrus-life-of-a-view", "legend": LEGEND, "options": options}
    parts = report.setdefault("parts", {})
    shop = [line["messages"][0]["content"] for line in narrow_log(requests, seed)]
    held_back = shop[: requests // 5]

    def keep(name: str, found: dict[str, Any]) -> None:
        parts[name] = found
        report["provenance"] = provenance(device="cpu", dtype="as listed", seed=seed)
        write_text_atomic(output, json.dumps(report, indent=1) + "\n")
        typer.echo(f"{name}: {json.dumps(found)[:200]}", err=True)

    built_in = [prompt.prompt for prompt in load_prompts(None, (), limit)]
    for dtype in DTYPES:
        if dtype not in parts:
            keep(dtype, drafted(Orthrus.load("default", dtype=dtype), built_in, max_new_tokens))
    if "own base" not in parts:
        keep("own base", drafted(Orthrus.load("default", dtype="float32"), held_back, max_new_tokens))
    lora = work / "lora"
    if "lora" not in parts:
        keep("lora", make_lora(lora, shop[requests // 5 :], max_new_tokens, seed))
    if "on the lora" not in parts:
        on_lora = Orthrus.load(str(lora), dtype="float32")
        found = drafted(on_lora, held_back, max_new_tokens)
        found["general"] = drafted(on_lora, built_in, max_new_tokens)
        same = sum(a == b for a, b in zip(found["digests"], parts["own base"]["digests"], strict=True))
        keep("on the lora", found | {"changed": 1 - same / len(held_back)})
    for number in epochs or (1.0, 3.0):
        if (name := f"adapted, {number:g} epochs") not in parts:
            keep(name, adapted(lora, shop, work / f"view-{number:g}", number, seed))
    own = parts["own base"]["tokens_per_cycle"]
    report["won_back"] = {
        "on the lora": parts["on the lora"]["tokens_per_cycle"] / own,
        **{k: v["on_held_back"] / own for k, v in parts.items() if "on_held_back" in v},
    }
    report["to_float32"] = {
        dtype: parts[dtype]["tokens_per_cycle"] / parts["float32"]["tokens_per_cycle"] for dtype in DTYPES
    }
    write_text_atomic(output, json.dumps(report, indent=1) + "\n")


def drafted(orthrus: Orthrus, prompts: list[Any], max_new_tokens: int) -> dict[str, Any]:
    """Counts of greedy answers by `chain`, and a digest of each answer."""
    results = orthrus.generate(prompts, strategy="chain", max_new_tokens=max_new_tokens)
    cycles = sum(result.stats.num_cycles for result in results)
    return {
        "tokens_per_cycle": sum(len(result.token_ids) - 1 for result in results) / cycles,
        "accepted_per_cycle": sum(result.stats.num_accepted for result in results) / cycles,
        "prompts": len(results),
        "digests": [output_digest(result.token_ids) for result in results],
    }


def styled(text: str) -> str:
    """The same answer as a list in lower case."""
    parts = [part.strip() for part in text.replace("\n", " ").split(".") if part.strip()]
    return "\n".join(f"* {part.lower()}" for part in parts)


def make_lora(folder: Path, requests: list[str], max_new_tokens: int, seed: int) -> dict[str, Any]:
    """Train a LoRA on styled answers of the base, with PEFT, and write it as PEFT does."""
    from peft import LoraConfig, get_peft_model

    orthrus = Orthrus.load("default", dtype="float32")
    answers = orthrus.generate(requests, strategy="chain", max_new_tokens=max_new_tokens)
    base = load_base("default", dtype="float32")
    torch.manual_seed(seed)
    kind = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base.model, kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(2):
        for request, answer in zip(requests, answers, strict=True):
            prompt = base.encode_prompt(request)
            end = [min(base.eos_token_ids)]
            said = base.tokenizer(styled(answer.text), add_special_tokens=False)["input_ids"]
            ids_1T = torch.tensor([[*prompt, *said, *end]])
            labels_1T = ids_1T.clone()
            labels_1T[:, : len(prompt)] = -100
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids_1T, labels=labels_1T).loss
            loss.backward()
            losses.append(float(loss.detach()))
            if len(losses) % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = "default"
    model.save_pretrained(folder)
    tenth = max(1, len(losses) // 10)
    return {
        "requests": len(requests),
        "parameters": sum(p.numel() for p in trained),
        "loss_first_tenth": sum(losses[:tenth]) / tenth,
        "loss_last_tenth": sum(losses[-tenth:]) / tenth,
    }


def adapted(lora: Path, shop: list[str], view: Path, epochs: float, seed: int) -> dict[str, Any]:
    """`orthrus adapt` of the shipped view on the LoRA's base; its own split of the requests."""
    log = view.with_name("shop.jsonl")
    write_text_atomic(log, "".join(json.dumps({"prompt": text}) + "\n" for text in shop))
    options = ["--model", str(lora), "--epochs", str(epochs), "--seed", str(seed), "--dtype", "bfloat16"]
    told = adapt(log, view, *options)
    figures = told["tokens_per_cycle"]
    return {
        "kept": told["kept"],
        "reason": told["reason"],
        "requests": told["requests"],
        "before": figures["held_back"]["old"],
        "on_held_back": figures["held_back"]["new"],
        "general": figures["general"],
    }


if __name__ == "__main__":
    typer.run(main)
