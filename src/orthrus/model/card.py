"""Makes the README of a view or merged folder from the view's settings and provenance."""

import json
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Literal

from huggingface_hub import ModelCardData

from orthrus.base.default_model import HUB_ID
from orthrus.base.resolve import DEFAULT, is_hub_id
from orthrus.model.dual_view import DualView
from orthrus.model.figures import figures_table, is_figures, key_table
from orthrus.model.twin import chosen_names
from orthrus.model.view_config import Encoding, ViewConfig

Folder = Literal["view", "merged", "released"]
# The recipe keys that the card shows, in this order, if the recipe has them.
_SETTINGS = {
    "train": "what was trained",
    "block_size": "block size K",
    "num_clean": "known tokens of a block",
    "first_target": "first target with weight",
    "clean_share": "share of blocks with more than one known token",
    "reveal": "mask rows that show their token",
    "rejected_share": "share of blocks that start at rejected drafts",
    "num_anchors": "blocks in a sequence",
    "sequence_length": "tokens of a sequence",
    "batch_size": "sequences of a step",
    "loss": "loss",
    "weights": "weights of block positions",
    "gamma": "gamma of the decay",
    "smoothing": "smoothing of dpace",
    "learning_rate": "learning rate (peak)",
    "weight_decay": "weight decay",
    "ema_decay": "decay of the weights' moving mean",
    "dtype": "dtype of the frozen base",
    "seed": "seed",
}
# Older names of keys in the recipes of older views.
_OLDER_NAMES = {"row_length": "sequence_length", "batch_rows": "batch_size"}
# Values that mean "not used"; the card leaves them out.
_ORDINARY = {
    "train": "view",
    "num_clean": 1,
    "first_target": 0,
    "clean_share": 1.0,
    "reveal": 0.0,
    "rejected_share": 0.0,
    "weight_decay": 0.0,
    "ema_decay": 0.0,
}


def view_card(dual: DualView, encoding: Encoding = "full", folder: Folder = "view") -> str:
    """Model card in Markdown, with the hub's metadata header.

    folder: "view" for a view alone, otherwise the layout of base and view together. Measured figures come from
    `provenance["figures"]` (rows as in `read_figures`), and the licence from `provenance["license"]` or the recipe.
    """
    config = dual.config
    name = HUB_ID.rpartition("/")[2] if config.base_name == DEFAULT else _public_name(config) or "its base"
    title = f"# Orthrus view for {name}" if folder == "view" else f"# {name} with its Orthrus view"
    sections = [
        f"---\n{_metadata(config, folder)}\n---",
        title,
        "A diffusion view drafts blocks of tokens for its frozen base model, and the base model checks them: "
        "the output\nis the base model's own, in fewer passes "
        f"([arXiv 2605.12825](https://arxiv.org/abs/2605.12825)). {_state(config)}",
        key_table(_at_a_glance(dual, encoding)),
        _use(config, folder),
        _measured(config),
        _training(config),
        _training(_of_twins(config), "Training of the twins"),
        *(_training(other, "Training of a view in the mean") for other in _averaged(config)),
        _limits(config),
        _licence(config, folder),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _public_name(config: ViewConfig) -> str:
    """The base's name for others: of a local file or folder, only the last part of its path."""
    name = config.base_name
    return name if name == DEFAULT or is_hub_id(name) else PurePath(name).name


def _metadata(config: ViewConfig, folder: Folder) -> str:
    """The hub's header. It has no base if the base is a local file or folder."""
    base = HUB_ID if config.base_name == DEFAULT else config.base_name
    known = is_hub_id(base)
    data = ModelCardData(
        license=stated_licence(config),
        library_name="orthrus",
        pipeline_tag="text-generation",
        tags=["orthrus", "speculative-decoding", "block-diffusion"],
        base_model=base if known else None,
        base_model_relation="adapter" if known and folder == "view" else None,
    )
    return data.to_yaml()


def _state(config: ViewConfig) -> str:
    if config.trained:
        return "Trained; `view_config.json` says how, in full."
    return (
        "**Not trained**: the view equals the base's own.\nThe output is lossless, but hardly any draft is "
        "accepted."
    )


def _at_a_glance(dual: DualView, encoding: Encoding) -> dict[str, str]:
    config = dual.config
    total, added = sum(p.numel() for p in dual.parameters()), dual.num_view_parameters()
    base = f"`default` ({HUB_ID})" if config.base_name == DEFAULT else _public_name(config)
    return {
        "base": base,
        "base fingerprint": f"`{config.base_fingerprint}`",
        "block size K": str(config.block_size),
        "mask": "a trained embedding" if config.mask_token_id is None else f"token id {config.mask_token_id}",
        "layers with twins": "all" if config.layers is None else ", ".join(map(str, config.layers)),
        "twins": _twins(dual),
        "repair head": "none" if config.repair_rank is None else f"of rank {config.repair_rank}",
        "weights stored": _stored(config, encoding),
        **({"mean of": f"{1 + len(others)} trained views"} if (others := _averaged(config)) else {}),
        "parameters added": f"{added:,} ({100 * added / total:.1f} % of base and view together)",
    }


def _twins(dual: DualView) -> str:
    config, family = dual.config, dual.family
    names = chosen_names(family, config.twins)
    if config.rank is None:
        return f"{', '.join(names)}, in full"
    low, full = ([n for n in names if family.is_norm(n) is norm] for norm in (False, True))
    scale = "" if config.rank_scale == 1 else f" and scale {config.rank_scale:g}"
    return f"{', '.join(low)}, of rank {config.rank}{scale}" + (
        f"; {', '.join(full)}, in full" if full else ""
    )


def _stored(config: ViewConfig, encoding: Encoding) -> str:
    if encoding == "full":
        return "as they are"
    if config.rank is not None:
        return "in float32"
    return "4-bit differences from the base's own projections, in groups of 64"


def _use(config: ViewConfig, folder: Folder) -> str:
    if folder == "view":
        base = _public_name(config) or "BASE"
        arguments = f'{json.dumps(base)}, view="path/to/this/folder"'
        shell = f"orthrus generate {base} PROMPT --view path/to/this/folder"
    else:
        arguments = '"path/to/this/folder"'
        shell = "orthrus generate path/to/this/folder PROMPT"
    transformers = "orthrus.OrthrusForCausalLM" if folder == "released" else "AutoModelForCausalLM"
    return f"""## Use

```python
from orthrus import Orthrus

orthrus = Orthrus.load({arguments})
print(orthrus.generate("Why is the sky blue?").text)
```

On the command line:

    {shell}

With transformers, after `import orthrus`: `{transformers}.from_pretrained("path/to/this/folder")`."""


def _measured(config: ViewConfig) -> str:
    figures, score = config.provenance.get("figures"), config.provenance.get("tokens_per_cycle")
    parts = []
    if is_figures(figures):
        parts.append(figures_table(figures))  # type: ignore[arg-type]
    if isinstance(score, float):
        step = config.provenance.get("step")
        parts.append(
            f"When it was kept (step {step}), it made {score:.2f} tokens per cycle in greedy decodes of "
            "held-out prompts;\n2.0 is what a view makes that never hits."
        )
    return "\n\n".join(["## Measured", *parts]) if parts else ""


def _of_twins(config: ViewConfig) -> ViewConfig:
    """The view before its repair head was trained; with an empty provenance if it has no repair head."""
    return replace(config, provenance=_mapping(config, "twins"))


def _averaged(config: ViewConfig) -> list[ViewConfig]:
    """The other views of which its weights are the mean, with their own provenance."""
    others = config.provenance.get("averaged")
    made = [other for other in others if isinstance(other, dict)] if isinstance(others, list) else []
    return [replace(config, provenance=other) for other in made]


def _training(config: ViewConfig, title: str = "Training") -> str:
    recipe, corpus = _recipe(config), _mapping(config, "corpus")
    if not config.trained or not (recipe or corpus):
        return ""
    parts = [
        f"## {title}",
        "It learned to foresee what the base writes: the data are the base's own answers.",
    ]
    if corpus:
        parts.append(key_table(_data(corpus)))
    if recipe:
        parts.append(key_table(_settings(recipe, config.provenance.get("step"))))
    run = _mapping(config, "run")
    if run.get("command"):
        versions = run.get("versions")
        ours = _package(versions) if isinstance(versions, dict) else None
        orthrus = "" if ours is None else f", {ours}"
        parts.append(f"Made with `{run['command']}` (commit {run.get('git_commit') or 'unknown'}{orthrus}).")
    return "\n\n".join(parts)


def _package(versions: dict[str, Any]) -> str | None:
    """Name and version of this package. Older views have its older distribution name."""
    names = ("orthrus-lm", "orthrus")
    return next((f"{name} {versions[name]}" for name in names if versions.get(name)), None)


def _data(corpus: dict[str, Any]) -> dict[str, str]:
    counted = ("dialogues", "answer_tokens")
    rows: dict[str, str] = {key.replace("_", " "): _number(corpus[key]) for key in counted if key in corpus}
    if isinstance(domains := corpus.get("domains"), dict) and domains:
        counts = sorted(domains.items(), key=lambda pair: -pair[1])
        rows["by domain"] = ", ".join(f"{domain} {_number(count)}" for domain, count in counts)
    if isinstance(sources := corpus.get("sources"), list) and sources:
        rows["prompts from"] = "; ".join(map(str, sources))
    if corpus.get("license"):
        rows["licence of the prompts"] = str(corpus["license"])
    return rows


def _settings(recipe: dict[str, Any], step: object) -> dict[str, str]:
    unused = {
        "gamma": recipe.get("weights") != "decay",
        "smoothing": recipe.get("weights") != "dpace",
    }
    rows = {} if step is None else {"steps done": _number(step)}
    for key, words in _SETTINGS.items():
        value = recipe.get(key)
        if value is not None and not unused.get(key) and value != _ORDINARY.get(key):
            rows[words] = str(value)
    if recipe.get("init_view"):
        rows["started from"] = "another trained view"
    return rows


def _limits(config: ViewConfig) -> str:
    lines = [
        "In float32, greedy output is the base's token for token, and sampled output has the base's distribution. "
        "In half\n  precision and on quantised bases near-ties may fall either way, as in every speculative decoder; "
        "`orthrus audit`\n  distinguishes them from faults.",
        "It belongs to the base of this fingerprint: on a fine-tuned one it stays lossless and drafts worse.",
        f"Blocks are at most {config.block_size} tokens long: that is what it was trained with.",
    ]
    length = _recipe(config).get("sequence_length")
    if config.trained and length:
        lines.append(
            f"It was trained on texts of up to {length} tokens; on longer ones, and on other kinds and "
            "languages than those it\n  saw, it may draft worse."
        )
    lines.append(
        "Fewer passes are less time only where a pass over a block costs little more than one token's."
    )
    return "## Limits\n\n" + "\n".join(f"* {line}" for line in lines)


def _licence(config: ViewConfig, folder: Folder) -> str:
    stated = stated_licence(config)
    if stated is None:
        text = "None was stated for the view; the base model's own licence applies."
    elif folder == "view":
        text = f"The view: {stated}. The base model has a licence of its own."
    else:
        text = f"The view: {stated}. The base model in this folder keeps a licence of its own."
    return f"## Licence\n\n{text}"


def stated_licence(config: ViewConfig) -> str | None:
    """The licence that a view's provenance or recipe states, in one line; None if there is none."""
    stated = config.provenance.get("license") or _recipe(config).get("license")
    return " ".join(str(stated).split()) or None if stated else None


def _recipe(config: ViewConfig) -> dict[str, Any]:
    """The recipe in the provenance, with the current names of its keys."""
    return {_OLDER_NAMES.get(key, key): value for key, value in _mapping(config, "recipe").items()}


def _mapping(config: ViewConfig, key: str) -> dict[str, Any]:
    """A part of the provenance; empty if it is missing or free text."""
    value = config.provenance.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
