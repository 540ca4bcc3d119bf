#!/usr/bin/env bash
# All that wants a GPU, in the order of its worth: train the default model's view, test, measure.
#
#   benchmarks/gpu.sh [OUT]                      OUT (runs/gpu) keeps corpus, view and results
#   DEVICE=cpu TINY=1 benchmarks/gpu.sh [OUT]    rehearses every command on a CPU; what it makes is worth nothing
#
# SYNTH_S and TRAIN_S: seconds after which making the corpus, and training on what there is of it, are stopped; both go
# on where they stopped when this is run again. BIN: where `orthrus` and its Python lie.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:-runs/gpu} BIN=${BIN:-.venv/bin} DEVICE=${DEVICE:-cuda}
corpus=(--batch-size 512 --shard-size 4096 --self-prompts math=20000 --self-prompts code=20000
    --self-prompts chat=12000 --self-prompts writing=6000 --self-prompts summary=6000)
recipe=recipes/smollm2-1gpu.yaml
length=(-n 256) passes=(--starts 3) few=(--limit 4)
if [[ -n ${TINY:-} ]]; then
    corpus=(--self-prompts math=12 --max-new-tokens 48)
    recipe=recipes/smoke-cpu.yaml
    length=(-n 8 --warmup 0) passes=(--repeats 1 --num-tokens 4 --starts 0) few=(--domain math --limit 1 --repeats 1)
fi

# Runs a command for so many seconds; being stopped by then is no failure.
for_seconds() {
    local status=0
    timeout --signal=INT "$@" || status=$?
    ((status == 0 || status == 124)) || exit "$status"
}

mkdir -p "$OUT"
for_seconds "${SYNTH_S:-0}" "$BIN/orthrus" synth "$OUT/corpus" --device "$DEVICE" --dtype bfloat16 "${corpus[@]}"
for_seconds "${TRAIN_S:-0}" "$BIN/orthrus" train "$recipe" corpus="$OUT/corpus" output="$OUT/view"

"$BIN/python" -m pytest -q -m gpu -rs

"$BIN/python" benchmarks/runners.py --device "$DEVICE" --view "$OUT/view/best" "${passes[@]}" \
    --setting bfloat16/eager --output "$OUT/runners.json"
"$BIN/orthrus" bench --device "$DEVICE" --view "$OUT/view/best" --dtype bfloat16 --runner eager \
    --strategy chain --strategy tree --strategy fused --strategy fused_tree --strategy auto "${few[@]}" "${length[@]}" \
    --format md -o "$OUT/bench.json"
"$BIN/python" benchmarks/peak_memory.py --device "$DEVICE" --view "$OUT/view/best" --runner eager \
    --num-tokens "${length[1]}" --output "$OUT/peak-memory.json"
"$BIN/orthrus" audit --device "$DEVICE" --view "$OUT/view/best" --dtype bfloat16 --runner eager \
    --strategy chain --strategy fused_tree --strategy auto --limit 2 --max-new-tokens "${length[1]}" -o "$OUT/audit.json"
