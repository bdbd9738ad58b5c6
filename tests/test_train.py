"""The toy's training: what it yields, that it learns what it sees, and that it is seeded."""

from __future__ import annotations

import dataclasses

import pytest

from mia import toy, train
from mia.config import TrainOptions
from mia.errors import UserError

OPTIONS = TrainOptions(checkpoints=(0, 2, 40), train_batch_size=8, learning_rate=3e-3, block_out_channels=(16, 32))


@pytest.fixture(scope="module")
def data():
    import torch

    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 4, 8, 8, generator=generator), torch.randn(9, 5, 16, generator=generator)


def trained(data, options=OPTIONS, seed=0):
    """Step -> a copy of the weights."""
    z0, states = data
    unet = train.new_unet(4, 8, 16, options, seed)
    steps = train.train(unet, z0, states, toy.schedule(), options, seed)
    return {step: {k: v.clone() for k, v in net.state_dict().items()} for step, net in steps}


def test_checkpoints_are_kept_in_order_and_step_0_is_untrained(data):
    import torch

    kept = trained(data)
    assert list(kept) == [0, 2, 40]
    fresh = train.new_unet(4, 8, 16, OPTIONS, 0).state_dict()
    assert all(torch.equal(kept[0][name], fresh[name]) for name in fresh)
    assert not torch.equal(kept[2]["conv_in.weight"], kept[40]["conv_in.weight"])


def test_the_loss_falls_on_what_is_trained_on(data):
    import torch

    z0, states = data
    unet, schedule = train.new_unet(4, 8, 16, OPTIONS, 0), toy.schedule()

    def loss() -> float:
        generator = torch.Generator().manual_seed(1)
        eps = torch.randn(z0.shape, generator=generator)
        a = float(schedule.at(301))
        with torch.no_grad():
            return float((unet(a**0.5 * z0 + (1 - a) ** 0.5 * eps, 301, states[:8]).sample - eps).square().mean())

    longer = dataclasses.replace(OPTIONS, checkpoints=(0, 2, 120))
    found = [loss() for _ in train.train(unet, z0, states, schedule, longer, 0)]
    assert found[0] > 0.9
    assert found[2] < 0.7 * found[0]


def test_a_seed_is_a_seed(data):
    import torch

    a, b, c = trained(data), trained(data), trained(data, seed=1)
    assert all(torch.equal(a[40][name], b[40][name]) for name in a[40])
    assert not torch.equal(a[40]["conv_in.weight"], c[40]["conv_in.weight"])


def test_every_image_is_seen_once_an_epoch():
    import torch

    order = train._epochs(10, 4, torch.Generator().manual_seed(0))
    rows = torch.cat([next(order) for _ in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:20].tolist()) == list(range(10))


def test_a_loss_that_is_not_finite_stops_the_training(data):
    z0, states = data
    with pytest.raises(UserError, match="training loss is nan at step 1, models.*learning_rate"):
        list(train.train(train.new_unet(4, 8, 16, OPTIONS, 0), z0 * float("inf"), states, toy.schedule(), OPTIONS, 0))
