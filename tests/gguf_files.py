"""Tiny GGUF files of any tensor type, written with the format's own package."""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter, TokenType
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

HEADS, LAYERS = 2, 2
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"


def write_gguf(
    path: Path, arch: str = "llama", kind: Kind = Kind.Q8_0, skip: str = "", hidden: int = 64
) -> dict[str, np.ndarray]:
    """A tiny model whose matrices are all `hidden` wide and of that type; returns their packed rows by name.

    Types that the gguf package only reads are filled with random bytes.
    """
    packed: dict[str, np.ndarray] = {}
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ĠĠ"]
    writer = GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)

    def add(name: str, rows: int, cols: int) -> None:
        if name == skip:
            return
        weight = rng.normal(0, 0.1, (rows, cols)).astype(np.float32)
        packed[name] = _pack(weight, kind, rng)
        writer.add_tensor(name, packed[name], raw_dtype=kind)

    add("token_embd.weight", len(tokens), hidden)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            add(f"blk.{layer}.{name}.weight", hidden, hidden)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return packed


def _pack(weight: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    try:
        return quantize(weight, kind)
    except NotImplementedError:
        block, num_bytes = GGML_QUANT_SIZES[kind]
        # Bytes below 60 leave the float16 scales among them finite.
        return rng.integers(0, 60, (weight.shape[0], weight.shape[1] // block * num_bytes), dtype=np.uint8)
