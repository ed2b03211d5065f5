"""The error of what inserts change: none for a network that passes them, all of it for one that wipes them away."""

import numpy as np
import pytest
import torch
from torch import nn

from bsdiff_rt.config import Schedule
from train.diffusion import Diffusion
from train.loop import Trainee, TrainOptions
from train.response import paired_samples, response_losses


def trainee_that_passes(passed):
    """A trainee whose network gives this share of the X-ray, whatever the noise."""

    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x_t, cxr, t):
            return passed * cxr + self.weight

    return Trainee(Passing(), TrainOptions(bf16=False))


def test_the_response_is_right_where_an_insert_passes_and_counts_where_it_does_not():
    """Bone left in the picture is the first term's business: a network that changes nothing has no second one."""
    rng = torch.Generator().manual_seed(0)
    samples = torch.rand(2, 5, 16, 16, generator=rng) - 0.5
    insert = torch.zeros(2, 16, 16)
    insert[:, 4:8, 4:8] = 0.25
    samples[:, 2:4] = samples[:, 0:2] + insert[:, None]
    samples[:, 4] = (insert > 0) / insert.square().sum((1, 2), keepdim=True)
    diffusion = Diffusion(Schedule(objective="x0"), torch.device("cpu"))
    given = paired_samples(diffusion, samples, np.random.default_rng(0))
    found = {}
    for name, passed in {"passes": 1.0, "half": 0.5, "flat": 0.0}.items():
        terms = {}
        (loss,) = response_losses(trainee_that_passes(passed), 3.0, given, terms)
        assert float(loss) == pytest.approx(terms["base"] + terms["response"], rel=1e-5)
        found[name] = terms
    assert found["passes"]["response"] == pytest.approx(0.0, abs=1e-8)
    assert found["passes"]["base"] > 0
    assert found["half"]["response"] == pytest.approx(3.0 * 0.25, rel=1e-3)
    assert found["flat"]["response"] == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_what_is_wanted_with_an_insert_follows_from_the_same_noise(objective):
    """The samples with inserts are noised as any, with the noise of those without."""
    samples = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    diffusion = Diffusion(Schedule(objective=objective), torch.device("cpu"))
    made = paired_samples(diffusion, samples, np.random.default_rng(4))
    for number, pair in enumerate((samples[:, 0:2], samples[:, 2:4])):
        alone_x_t, alone_cxr, alone_t, alone_wanted, _ = diffusion.add_noise(pair, np.random.default_rng(4))
        torch.testing.assert_close(made.x_t[:, number], alone_x_t)
        torch.testing.assert_close(made.cxr[:, number], alone_cxr)
        torch.testing.assert_close(made.t, alone_t)
        torch.testing.assert_close(made.wanted[:, number], alone_wanted)


def test_pieces_of_a_batch_add_up_to_it():
    samples = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(1))
    given = paired_samples(Diffusion(Schedule(objective="x0"), torch.device("cpu")), samples, np.random.default_rng(4))
    trainee = trainee_that_passes(0.7)
    (whole,) = response_losses(trainee, 0.5, given, {})
    trainee.options = TrainOptions(bf16=False, accumulate=3)
    parts = list(response_losses(trainee, 0.5, given, {}))
    assert len(parts) == 3
    torch.testing.assert_close(sum(parts), whole)
