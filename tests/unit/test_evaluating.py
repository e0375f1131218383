"""Running a plain module in evaluation mode without leaving a trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_efficient.common.running import as_found, evaluating, randomness_kept


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    net[1].eval()
    return net


def test_flags_buffers_and_random_states_come_back() -> None:
    net, x = model(), torch.randn(4, 3)
    flags = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with evaluating(net):
        assert not any(module.training for module in net.modules())
        assert not net(x).requires_grad
        net.train()(x + torch.rand(1))
        net[1].running_var = torch.full((3,), 7.0)
        random.random(), np.random.rand()
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_parameters_come_back_if_asked_for_and_gradients_always() -> None:
    net = model()
    weight = net[0].weight
    net(torch.randn(4, 3)).sum().backward()
    grad, value, data = weight.grad, weight.detach().clone(), weight.data_ptr()
    with as_found(net, parameters=True):
        assert weight.grad is None
        net.requires_grad_(False)
        weight.data = weight.data * 2
        net[0].bias.data.add_(1)
    assert weight.grad is grad
    assert weight.requires_grad
    assert torch.equal(weight, value)
    assert weight.data_ptr() == data
    with as_found(net):
        weight.data.mul_(2)
    assert torch.equal(weight, 2 * value)


def test_buffers_of_modules_apart_are_the_callers() -> None:
    net = model().train()
    with as_found(net, apart=[net[1]]):
        net(torch.randn(4, 3))
    assert int(net[1].num_batches_tracked) == 1


def test_random_states_may_go_on() -> None:
    net = model()
    with evaluating(net, randomness=False):
        first = torch.rand(1)
    assert torch.rand(1) != first
    with randomness_kept():
        second = torch.rand(1)
    assert torch.rand(1) == second


def test_an_error_puts_everything_back() -> None:
    net = model()
    with pytest.raises(RuntimeError), evaluating(net):
        net(torch.randn(4, 2))
    assert net.training
    assert not net[1].training
    assert torch.is_grad_enabled()
