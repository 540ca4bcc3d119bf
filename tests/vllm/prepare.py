"""What the tests compare with: folders for vLLM, prompts, and what our own engine does with them.

`make test-vllm` runs it in the environment of Orthrus, before any vLLM: python -m tests.vllm.prepare FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

from orthrus.api import Orthrus
from orthrus.base.bench_prompts import load_prompts
from orthrus.base.provenance import provenance
from orthrus.integrations.vllm.export import export_vllm

NUM_PROMPTS, NEW_TOKENS = 24, 48


def oracle_of(orthrus: Orthrus, prompts: list[str], new_tokens: int, *, raw: bool = False) -> dict[str, Any]:
    """Token ids of prompts, and what `chain` makes of them."""
    found = [
        orthrus.generate(p, strategy="chain", max_new_tokens=new_tokens, ignore_eos=True, raw=raw)
        for p in prompts
    ]
    drafted = [cycle for one in found for cycle in one.cycles if cycle.num_drafted]
    return {
        "prompts": [orthrus.base.encode_prompt(p, raw=raw) for p in prompts],
        "new_tokens": new_tokens,
        "token_ids": [list(one.token_ids) for one in found],
        "cycles": sum(one.stats.num_cycles for one in found),
        "accepted_by_position": [sum(c.num_accepted > i for c in drafted) for i in range(6)],
        "num_drafts": len(drafted),
    }


def main(folder: Path) -> None:
    orthrus = Orthrus.load("default", dtype="float32")
    export_vllm(orthrus.dual, orthrus.base, folder / "orthrus")
    orthrus.stock().save_pretrained(folder / "stock")
    orthrus.base.tokenizer.save_pretrained(folder / "stock")
    # Every domain has some, the long ones of summaries too.
    prompts = [each.prompt for each in load_prompts(limit=5)[:NUM_PROMPTS]]
    oracle = oracle_of(orthrus, prompts, NEW_TOKENS)
    oracle["provenance"] = provenance(device="cpu", dtype="float32", seed=0)
    (folder / "oracle.json").write_text(json.dumps(oracle))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
