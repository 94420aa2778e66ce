from __future__ import annotations

import torch

from effformer.train.seeding import Order, isolated_randomness, seed_for


def test_every_epoch_is_a_permutation() -> None:
    order = Order(samples=10, batch=4, seed=0)
    rows = torch.cat([order.rows(step) for step in range(10)])
    epochs = rows.view(4, 10)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(epochs[0], epochs[1])


def test_order_is_a_function_of_the_step() -> None:
    forward = [Order(10, 4, seed=0).rows(step).tolist() for step in range(8)]
    one = Order(10, 4, seed=0)
    assert [one.rows(step).tolist() for step in range(7, -1, -1)] == forward[::-1]
    assert [Order(10, 4, seed=1).rows(step).tolist() for step in range(8)] != forward


def test_batches_larger_than_the_data() -> None:
    rows = Order(samples=3, batch=8, seed=0).rows(1)
    assert rows.shape == (8,)
    assert rows.bincount(minlength=3).min() >= 2


def test_seeds_differ_by_purpose_and_step() -> None:
    seeds = {seed_for(s, what, step) for s in (0, 1) for what in "ab" for step in range(500)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_for(0, "order", 1) == seed_for(0, "order", 1)


def test_randomness_is_restored() -> None:
    before = torch.get_rng_state()
    with isolated_randomness(torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
