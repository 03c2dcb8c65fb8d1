import math

import pytest

from moco_tf import schedules
from moco_tf.methods.ema import cosine_momentum


def test_steps_drop_when_their_epoch_begins():
    rates = [float(schedules.steps(0.03, epoch, [120, 160])) for epoch in (0.0, 119.9, 120.0, 159.0, 160.0)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003])


@pytest.mark.parametrize("epoch", [0.0, 1.0, 77.5, 200.0])
def test_cosine_is_the_closed_form(epoch):
    expected = 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
    assert float(schedules.cosine(0.03, epoch, 200)) == pytest.approx(expected, abs=1e-12)


def test_warm_up_is_a_line_from_zero():
    rates = [float(schedules.warm_up(0.5, 0.6, epoch, 10)) for epoch in (0.0, 2.5, 10.0)]
    assert rates == pytest.approx([0.0, 0.15, 0.5])


def test_no_warm_up_leaves_the_rate():
    assert float(schedules.warm_up(0.5, 0.6, 0.0, 0)) == 0.5


@pytest.mark.parametrize("step", [0, 3, 10, 12])
def test_cosine_momentum_ends_at_one(step):
    expected = 1 - 0.01 * (1 + math.cos(math.pi * min(step, 10) / 10)) / 2
    assert float(cosine_momentum(0.99, step, 10)) == pytest.approx(expected, abs=1e-12)
