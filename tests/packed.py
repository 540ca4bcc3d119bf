"""Dialogues as the sequences that training reads, without a corpus folder around them."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from orthrus.training.corpus import Sample
from orthrus.training.pack_writer import write_pack
from orthrus.training.packs import Pack, open_pack


def pack(samples: Sequence[Sample], sequence_length: int) -> Pack:
    """Packed sequences; their files are gone, but stay readable as long as somebody holds them."""
    with TemporaryDirectory() as folder:
        write_pack(samples, Path(folder), sequence_length)
        return open_pack(Path(folder))


def corpus_digest(samples: Sequence[Sample]) -> str:
    return pack(samples, 2**12).about.digest
