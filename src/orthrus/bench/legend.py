"""The formula of every number in a benchmark report. docs/metrics.md has the same names, which a test checks."""

LEGEND = {
    "tokens": "new tokens, end-of-sequence included, summed over prompts and repeats",
    "passes": "forward passes of the model, prefill included, both views counted",
    "cycles": "rounds of drafting and verifying after the prefill: draft and verify, one fused pass, or one AR pass",
    "tokens_per_cycle_mean": "mean over prompts and repeats of (tokens - 1) / cycles",
    "tokens_per_cycle_pooled": "sum of (tokens - 1) / sum of cycles",
    "tokens_per_cycle_histogram": "how many cycles committed 0, 1, 2, ... tokens",
    "tokens_per_forward_mean": "mean over prompts and repeats of tokens / passes",
    "tokens_per_forward_pooled": "sum of tokens / sum of passes",
    "rows_per_pass": "sum of rows of both views / sum of passes, both without the prefill",
    "acceptance_rate": "accepted drafts / verified drafts; the AR view's own tokens in neither",
    "accepted_per_cycle": "accepted drafts / cycles that drafted; the AR view's own tokens not counted",
    "accepted_histogram": "how many drafting cycles accepted 0, 1, 2, ... drafts",
    "acceptance_by_position": "entry j from 1: drafting cycles that accepted at least j / those that accepted at "
    "least j - 1 and judged at least j one after the other; a tree judges along its first branch",
    "ttft_ms": "request to first token; median (min..max) over prompts and repeats",
    "tpot_ms": "sum of time after the first token / sum of (tokens - 1); median (min..max) over repeats",
    "tokens_per_second": "sum of tokens / sum of time, first token included; median (min..max) over repeats",
    "speedup_vs_stock": "time per token of the stock model's own generate / this arm's, time to first token "
    "included, same prompt and repeat; median over repeats, geometric mean over prompts [95 % interval: "
    "percentiles of 10,000 bootstrap draws of prompts, seed 0; none of a single prompt]",
    "speedup_vs_ar": "as above, against our plain decoding",
    "equal_to_plain": "prompts whose tokens equal the baseline's in every repeat / prompts; baseline of greedy text: "
    "the stock model, of sampled text: ar with the same seed",
    "peak_bytes": "most memory during a run, the largest over runs: of PyTorch's allocator on a GPU, else of the "
    "whole process, in which the weights of all arms lie",
    "flops_per_token": "(2 x (rows x weights of the layers' linears that they pass through + projected rows x "
    "weights of the head) + 4 x heads x head size x layers x (row, position read) pairs) / (tokens - 1), after "
    "the first token",
    "bytes_per_token": "(bytes of weights, once for each pass that uses them, and of keys and values read once a "
    "pass and written) / (tokens - 1), after the first token",
    "joules_per_token": "(energy of packages and memory by RAPL - idle power x time) / tokens; none where the "
    "machine does not report it",
    "speedup_vs_stock_geomean": "geometric mean of the domains' speedup_vs_stock [95 % interval: 10,000 bootstrap "
    "draws of prompts within each domain, seed 0; none where a domain has a single prompt]",
    "speedup_vs_ar_geomean": "as above, of speedup_vs_ar",
    "worst_domain": "the domain with the lowest speedup_vs_stock, and that speed-up",
}
