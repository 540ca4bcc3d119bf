"""Model folders as they lie on users' disks, tiny: a base with a tokenizer of one character per token."""

from pathlib import Path

from tests.tiny import VOCAB, disturb_view, tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from orthrus.base.loading import Base
from orthrus.model.dual_view import DualView
from orthrus.model.loading import load_dual

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?"


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """<pad> 0, <s> 1, </s> 2, then letters; one embedding row of the tiny models is left for the mask."""
    names = ["<pad>", "<s>", "</s>", *LETTERS][: VOCAB - 1]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_base(folder: Path, name: str = "llama", seed: int = 0) -> Path:
    """A stock base as `save_pretrained` writes it."""
    tiny_model(name, seed).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def load_disturbed(folder: Path, amount: float = 0.15) -> tuple[Base, DualView]:
    """The base of a folder, with a view whose drafts are partly wrong."""
    base, dual = load_dual(str(folder), "untrained", device="cpu")
    disturb_view(dual, amount)
    return base, dual
