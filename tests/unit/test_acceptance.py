"""Acceptance on the device against acceptance on the host, on random trees."""

import random

import torch
from tests.tiny import VOCAB, tiny_dual

from orthrus.config import SamplingParams
from orthrus.decoding.acceptance import TreeOnDevice
from orthrus.decoding.tree import DraftTree, accepted_rows
from orthrus.engine.state import timed_request


def random_tree(generator: random.Random, num_nodes: int) -> DraftTree:
    """Siblings with different tokens, of a vocabulary so small that paths are accepted."""
    parents: list[int] = []
    token_ids: list[int] = []
    for _ in range(num_nodes):
        parent = generator.randint(max(0, len(parents) - 3), len(parents))
        taken = {t for t, p in zip(token_ids, parents, strict=True) if p == parent}
        free = sorted(set(range(6)) - taken)
        parents.append(parent)
        token_ids.append(generator.choice(free))
    return DraftTree(token_ids, parents, [0.0] * num_nodes)


def test_the_device_accepts_what_the_host_does() -> None:
    generator = random.Random(0)
    lengths, served = set(), 0
    for _ in range(400):
        tree = random_tree(generator, generator.randint(0, 12))
        own_ids = [generator.randrange(6) for _ in range(tree.num_nodes + 1)]
        # Make some path stand, or random ones would end at once.
        for row, (token_id, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True), start=1):
            if generator.random() < 0.5 and parent < row:
                own_ids[parent] = token_id
        path = [0, *accepted_rows(tree, own_ids)]
        own_ids_R = torch.tensor(own_ids)
        blocks = sorted(generator.sample(range(tree.num_nodes + 1), generator.randint(1, tree.num_nodes + 1)))
        sent = TreeOnDevice(tree, blocks, own_ids_R.device)
        assert sent.accepted(own_ids_R).nonzero().flatten().tolist() == path
        lengths.add(len(path))

        on_path = [i for i, row in enumerate(blocks) if row in path]
        serving = sent.serving(own_ids_R)
        assert serving.anchor_1.tolist() == [own_ids[path[-1]]]
        if on_path:
            depths = [0, *tree.depths()]
            index = max(on_path, key=lambda i: depths[blocks[i]])
            assert serving.index_1.tolist() == [index]
            assert serving.first_1.tolist() == [depths[path[-1]] - depths[blocks[index]]]
            served += 1
    assert lengths >= {1, 2, 3, 4, 5}
    assert served > 200


@torch.inference_mode()
def test_a_block_that_does_not_serve_does_no_harm() -> None:
    """Its anchor was turned down, deeper than the block has guesses below the end of the path."""
    dual = tiny_dual(repair_rank=4)
    state = timed_request(dual, dual.new_cache(32), SamplingParams(), 32)
    tree = DraftTree([3, 4, 5, 6], [0, 1, 2, 3], [0.0] * 4)
    logits_RV = torch.zeros(5, VOCAB)
    logits_RV[:, 9] = 1.0
    sent = TreeOnDevice(tree, [4], logits_RV.device)
    assert state.choose_and_propose(logits_RV, sent, torch.randn(1, 2, 32), None)[0] == [9] * 5
