"""Packed corpora: the sequences of a slow oracle, packed once by one process, refused when damaged."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.packed import pack
from tests.workers import run_together

from orthrus.base.owned import replace_folder
from orthrus.errors import CorruptFileError, OrthrusError, StorageError, UserInputError
from orthrus.training import pack_writer
from orthrus.training.corpus import Sample
from orthrus.training.pack_index import INDEX, KIND
from orthrus.training.packing import PackedSequence
from orthrus.training.packs import CACHE, Pack, check_files, open_pack, packed, packed_corpora

LENGTH = 24


def samples_of(number: int, seed: int = 0) -> list[Sample]:
    """Dialogues of 4 to 24 tokens, some of two answers, two of which touch."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(number):
        num_prompt, num_answer = (int(torch.randint(2, 13, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(0, 2**28, (num_prompt + num_answer,), generator=generator).tolist()
        spans = ((0, num_answer // 2), (num_answer // 2 + i % 2, num_answer)) if num_answer > 4 else ()
        made.append(Sample(tuple(ids[:num_prompt]), tuple(ids[num_prompt:]), ("math", "chat")[i % 2], spans))
    return made


def oracle(samples: list[Sample], sequence_length: int) -> list[PackedSequence]:
    """Sequences as a list of lists: each dialogue goes to the first of 16 open sequences that has room."""
    open_sequences: list[list[Sample]] = []
    sequences: list[list[Sample]] = []

    def room(sequence: list[Sample]) -> int:
        return sequence_length - sum(len(s.prompt_ids) + len(s.answer_ids) for s in sequence)

    for sample in samples:
        length = len(sample.prompt_ids) + len(sample.answer_ids)
        sequence = next((sequence for sequence in open_sequences if room(sequence) >= length), None)
        if sequence is None:
            sequence = []
            sequences.append(sequence)
            open_sequences.append(sequence)
        sequence.append(sample)
        if len(open_sequences) > 16:
            del open_sequences[min(range(17), key=lambda i: room(open_sequences[i]))]
    return [in_full(sequence, sequence_length) for sequence in sequences]


def in_full(sequence: list[Sample], sequence_length: int) -> PackedSequence:
    ids, positions, documents, answers = ([] for _ in range(4))
    number = 0
    for index, sample in enumerate(sequence):
        own = [*sample.prompt_ids, *sample.answer_ids]
        of_token = [-1] * len(own)
        for start, end in sample.answer_spans:
            first = len(sample.prompt_ids)
            of_token[first + start : first + end] = [number] * (end - start)
            number += 1
        ids, positions = ids + own, positions + list(range(len(own)))
        documents, answers = documents + [index] * len(own), answers + of_token
    padding = sequence_length - len(ids)
    filled = [ids + [0] * padding, positions + [0] * padding]
    filled += [documents + [-1] * padding, answers + [-1] * padding]
    return PackedSequence(*map(torch.tensor, filled))


def assert_equal_sequences(found: Any, expected: list[PackedSequence]) -> None:
    assert len(found) == len(expected)
    for sequence, other in zip(found, expected, strict=True):
        for name in PackedSequence.__slots__:
            assert torch.equal(getattr(sequence, name), getattr(other, name)), name


def write_corpus(folder: Path, samples: list[Sample], base: str | None = "a base") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt_ids": s.prompt_ids, "domain": s.domain} for s in samples]
    answers = [{"prompt": i, "answer_ids": s.answer_ids, "spans": s.spans} for i, s in enumerate(samples)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    (folder / "answers-00000.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    if base is not None:
        settings = {"base_fingerprint": base, "sources": [{"file": "mine.jsonl"}]}
        (folder / "manifest.json").write_text(json.dumps({"settings": settings, "sources": {}}))
    return folder


@pytest.mark.parametrize("shard_words", [1, 5 * LENGTH, 2**26])
@pytest.mark.parametrize("number", [1, 17, 300])
def test_sequences_are_those_of_the_oracle(
    number: int, shard_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_writer, "_SHARD_WORDS", shard_words)
    samples = samples_of(number)
    found = pack(samples, LENGTH)
    assert_equal_sequences(found, oracle(samples, LENGTH))
    assert_equal_sequences(found[:3], oracle(samples, LENGTH)[:3])
    assert found.about.tokens == sum(len(s.prompt_ids) + len(s.answer_ids) for s in samples)
    assert found.about.answer_tokens == sum(s.num_answered for s in samples)
    with pytest.raises(IndexError):
        found[len(found)]


def test_the_digest_names_the_dialogues_alone() -> None:
    samples = samples_of(20)
    digest = pack(samples, LENGTH).about.digest
    assert digest == pack(samples, 99).about.digest
    for other in (samples[1:], samples[::-1], [*samples[:-1], Sample((1,), (2, 3), "chat")]):
        assert pack(other, LENGTH).about.digest != digest
    # The same tokens, another part of them answered.
    assert (
        pack([Sample((1, 2), (3,), "x")], 8).about.digest != pack([Sample((1,), (2, 3), "x")], 8).about.digest
    )


def test_a_corpus_is_packed_once_and_again_when_it_changed(tmp_path: Path) -> None:
    samples = samples_of(40)
    folder = write_corpus(tmp_path / "corpus", samples)
    stages: list[tuple[str, int, int | None]] = []
    sequences = packed_corpora([str(folder)], LENGTH, on_progress=lambda *seen: stages.append(seen))
    assert_equal_sequences(sequences, oracle(samples, LENGTH))
    assert (sequences.dialogues, sequences.parts[str(folder)].about.sources) == (40, ("mine.jsonl",))
    assert [total for _, _, total in stages] == [sum(f.stat().st_size for f in folder.glob("*.json*"))] * 2
    written = (folder / CACHE / str(LENGTH) / INDEX).stat().st_mtime_ns
    assert packed_corpora([str(folder)], LENGTH).digest == sequences.digest
    assert (folder / CACHE / str(LENGTH) / INDEX).stat().st_mtime_ns == written
    write_corpus(folder, samples[:30])
    assert packed_corpora([str(folder)], LENGTH).dialogues == 30
    # Sequences that somebody reads stay what they were.
    assert_equal_sequences(sequences, oracle(samples, LENGTH))


def test_several_processes_pack_once(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", samples_of(60))
    run_together(_note_pack, 3, tmp_path / "store", str(folder), str(tmp_path))
    assert len({file.read_text() for file in tmp_path.glob("packed-*")}) == 1
    assert len(list(tmp_path.glob("packed-*"))) == 3


def _note_pack(folder: str, notes: str) -> None:
    pack = packed(Path(folder), LENGTH)
    changed = (pack.folder / INDEX).stat().st_mtime_ns
    Path(notes, f"packed-{os.environ['RANK']}").write_text(f"{changed} {pack.about.digest}")


def test_a_pack_of_an_older_format_is_refused_or_made_again(tmp_path: Path) -> None:
    samples = samples_of(9)
    folder = write_corpus(tmp_path / "corpus", samples)
    pack = packed(folder, LENGTH)
    moved = tmp_path / "packed"
    with replace_folder(pack.folder, KIND) as older:
        (older / INDEX).write_text(json.dumps({"kind": KIND, "format": 1, "row_length": LENGTH}))
        (older / "rows-00000.u32").write_bytes(b"\0" * 4 * LENGTH)
    shutil.copytree(pack.folder, moved)
    with pytest.raises(CorruptFileError, match=r"another version .*pack\.json; .* pack the corpus again"):
        packed(moved, LENGTH)
    assert_equal_sequences(packed(folder, LENGTH), oracle(samples, LENGTH))
    assert not (pack.folder / "rows-00000.u32").exists()


def test_a_killed_packing_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_corpus(tmp_path / "corpus", samples_of(5))
    scrap = folder / CACHE / f".{LENGTH}.orthrus-scratch-killed"
    scrap.mkdir(parents=True)
    (scrap / "sequences-00000.u32").write_bytes(b"half")
    assert packed(folder, LENGTH).about.dialogues == 5
    assert not scrap.exists()


def test_several_corpora_are_read_one_after_the_other(tmp_path: Path) -> None:
    first, second = samples_of(30), samples_of(25, seed=1)
    folders = [str(write_corpus(tmp_path / name, s)) for name, s in (("a", first), ("b", second))]
    sequences = packed_corpora(folders, LENGTH)
    assert_equal_sequences(sequences, oracle(first, LENGTH) + oracle(second, LENGTH))
    assert sequences.digest not in {pack.about.digest for pack in sequences.parts.values()}
    assert sequences.digest != packed_corpora(folders[::-1], LENGTH).digest
    write_corpus(tmp_path / "b", second, base="another")
    with pytest.raises(UserInputError, match="different bases"):
        packed_corpora(folders, LENGTH)
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(UserInputError, match="does not say which base"):
        packed_corpora(folders, LENGTH)


def test_long_dialogues_are_refused_or_left_out(tmp_path: Path) -> None:
    samples = [Sample((1, 2), (9,) * 30, "other"), Sample((1, 2), (4,) * 5, "test")]
    folder = str(write_corpus(tmp_path, samples))
    with pytest.raises(
        UserInputError, match=r"1 of 2 dialogues in .* are longer than a sequence of 16 .* has 32"
    ):
        packed_corpora([folder], 16)
    kept = packed_corpora([folder], 16, drop_long=True)
    assert_equal_sequences(kept, oracle(samples[1:], 16))
    # A view's card says what it learnt from.
    about = kept.parts[folder].about
    assert (about.dialogues, about.num_long, about.longest) == (1, 1, 32)
    assert (about.tokens, about.answer_tokens, about.domains, about.largest_id) == (7, 5, {"test": 1}, 4)
    with pytest.raises(UserInputError, match="every dialogue is longer"):
        packed_corpora([folder], 4, drop_long=True)


def test_a_packed_folder_stands_for_its_corpus(tmp_path: Path) -> None:
    samples = samples_of(9)
    folder = write_corpus(tmp_path / "corpus", samples)
    moved = packed(folder, LENGTH).folder.rename(tmp_path / "moved")
    assert_equal_sequences(packed_corpora([str(moved)], LENGTH), oracle(samples, LENGTH))
    with pytest.raises(UserInputError, match=r"have 24 tokens, the recipe wants 48; set sequence_length: 24"):
        packed_corpora([str(moved)], 48)


def test_a_folder_that_cannot_be_written_says_where_else(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", samples_of(3))
    (folder / CACHE).write_text("in the way")
    with pytest.raises(StorageError, match=r"orthrus pack .* --output FOLDER"):
        packed(folder, LENGTH)


def whole_pack(folder: Path) -> Pack:
    return packed(write_corpus(folder / "corpus", samples_of(9)), LENGTH)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    pack = whole_pack(tmp_path)
    check_files(pack)
    file = pack.folder / "sequences-00000.u32"
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\0\0\0\0" + content[8:])
    with pytest.raises(CorruptFileError, match=r"sequences-00000\.u32 is damaged .*content"):
        check_files(pack)
    file.write_bytes(b"\xff\xff\xff\x0f" + content[4:])
    small = json.loads((pack.folder / INDEX).read_text()) | {"largest_id": 9}
    (pack.folder / INDEX).write_text(json.dumps(small))
    with pytest.raises(CorruptFileError, match="unknown token id"):
        open_pack(pack.folder)[0]
    file.write_bytes(content[:-1])
    with pytest.raises(CorruptFileError, match="size"):
        open_pack(pack.folder)
    file.unlink()
    with pytest.raises(CorruptFileError, match=r"sequences-00000\.u32"):
        open_pack(pack.folder)


JUNK: list[Any] = [None, -1, 1.5, "x", [], {}, True, 2**80, [[]]]


@pytest.mark.parametrize(
    "key", ["sequence_length", "num_sequences", "shard_sequences", "largest_id", "domains", "digest"]
)
def test_an_index_with_wrong_values(tmp_path: Path, key: str) -> None:
    pack = whole_pack(tmp_path)
    file = pack.folder / INDEX
    content = json.loads(file.read_text())
    for value in JUNK:
        if (key, value) in (("digest", "x"), ("domains", {})):
            continue
        file.write_text(json.dumps(content | {key: value}))
        with pytest.raises(OrthrusError, match="damaged"):
            open_pack(pack.folder)
    for text in ("", "{", "[]", json.dumps(content | {"kind": "x"}), "[" * 99_999):
        file.write_text(text)
        with pytest.raises(CorruptFileError, match=r"pack\.json is damaged"):
            open_pack(pack.folder)
