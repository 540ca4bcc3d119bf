"""The README of a view folder: what it is, what it belongs to, how to use it."""

from orthrus.model.dual_view import DualView
from orthrus.model.view_config import Encoding

_STORED: dict[Encoding, str] = {
    "full": "as they are",
    "delta4": "4-bit differences from the base's own projections, in groups of 64",
}


def view_card(dual: DualView, encoding: Encoding = "full") -> str:
    """Model card in Markdown, with the hub's metadata header."""
    config = dual.config
    total, added = sum(p.numel() for p in dual.parameters()), dual.num_view_parameters()
    mask = "a trained embedding" if config.mask_token_id is None else f"token id {config.mask_token_id}"
    state = (
        "Trained; its provenance is in `view_config.json`."
        if config.trained
        else "**Not trained**: the twins are copies of the base's projections. The output is lossless, but "
        "hardly any draft is accepted."
    )
    return f"""---
library_name: orthrus
tags: [orthrus, speculative-decoding, block-diffusion]
base_model: {config.base_name}
---
# Orthrus view for {config.base_name}

A diffusion view drafts blocks of tokens for its frozen base model, and the base model checks them: the output
is the base model's own, in fewer passes (arXiv 2605.12825). {state}

| | |
| --- | --- |
| base | {config.base_name} |
| base fingerprint | `{config.base_fingerprint}` |
| block size K | {config.block_size} |
| mask | {mask} |
| layers with twins | {"all" if config.layers is None else ", ".join(map(str, config.layers))} |
| weights stored | {_STORED[encoding]} |
| parameters added | {added:,} ({100 * added / total:.1f} % of base and view together) |

```python
from orthrus import Orthrus

orthrus = Orthrus.load("{config.base_name}", view="path/to/this/folder")
print(orthrus.generate("Why is the sky blue?").text)
```
"""
