"""What is counted, and in which unit."""

import torch
from torch import nn

from fewstep.cost import Counted, flops, flops_both_ways
from fewstep.types import Sample


def test_passes_are_counted_in_samples_and_backward_ones_where_a_gradient_is_wanted():
    double = Counted(lambda x: 2 * x)
    assert torch.equal(double(torch.ones(3, 2)), 2 * torch.ones(3, 2))
    double(torch.ones(5, 2, requires_grad=True))
    with torch.no_grad():
        double(torch.ones(7, 2, requires_grad=True))
    assert (double.forwards, double.backwards, double.cost) == (15, 5, 25)
    k = torch.zeros(4, dtype=torch.long)
    reward = Counted(lambda sample: len(sample.prompts))
    assert reward(Sample(torch.ones(4, 1, 1, 1), torch.ones(4), {}, ["a"] * 4, k)) == 4
    assert reward.cost == 4


def test_a_reward_that_draws_is_counted_with_what_it_has_drawn():
    class Own:
        def draw_for_call(self, sample):
            return {"noise": 2 * sample.x0}

        def __call__(self, sample, *, noise):
            return noise

    k, reward = torch.zeros(4, dtype=torch.long), Counted(Own())
    sample = Sample(torch.ones(4, 1, 1, 1), torch.ones(4), {}, ["a"] * 4, k)
    assert torch.equal(reward(sample, **reward.draw_for_call(sample)), 2 * sample.x0) and reward.forwards == 4
    assert not hasattr(Counted(lambda sample: sample), "draw_for_call")


def test_flops_of_a_convolution_and_a_product_by_hand():
    convolution, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 11)
    assert flops(lambda: convolution(torch.ones(1, 3, 8, 8))) == 2 * 3 * 5 * 9 * 64
    assert flops(lambda: linear(torch.ones(2, 7))) == 2 * 2 * 7 * 11
    # an adapter's second product, which is added in place
    assert flops(lambda: torch.zeros(2, 11).addmm_(torch.ones(2, 7), torch.ones(7, 11))) == 2 * 2 * 7 * 11


def test_flops_of_a_backward_pass_by_hand():
    """One product for each weight's gradient, and one for each that leads on to what is trained below."""
    network, x = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)), torch.ones(2, 3)
    lower, upper = 2 * 2 * 3 * 5, 2 * 2 * 5 * 7
    assert flops_both_ways(network, (x,), trained=True) == (lower + upper, lower + 2 * upper)
    network[1].requires_grad_(False)
    assert flops_both_ways(network, (x,), trained=True) == (lower + upper, lower + upper)
    assert flops_both_ways(network, (x,), trained=False) == (lower + upper, 0)
