"""Acceptance on the device against acceptance on the host, on random trees."""

import random

import torch

from orthrus.decoding.acceptance import accepted_on_device, serving_block
from orthrus.decoding.tree import DraftTree, accepted_rows


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
        assert accepted_on_device(tree, own_ids_R).nonzero().flatten().tolist() == path
        lengths.add(len(path))

        blocks = sorted(generator.sample(range(tree.num_nodes + 1), generator.randint(1, tree.num_nodes + 1)))
        on_path = [i for i, row in enumerate(blocks) if row in path]
        serving = serving_block(tree, blocks, own_ids_R)
        assert serving.anchor_1.tolist() == [own_ids[path[-1]]]
        if on_path:
            depths = [0, *tree.depths()]
            index = max(on_path, key=lambda i: depths[blocks[i]])
            assert serving.index_1.tolist() == [index]
            assert serving.first_1.tolist() == [depths[path[-1]] - depths[blocks[index]]]
            served += 1
    assert lengths >= {1, 2, 3, 4, 5}
    assert served > 200
