import pytest
import torch

from mmtoken.heads.annealing import MaskAnnealing


def test_shares_fall_block_after_block():
    annealing = MaskAnnealing(num_blocks=3, total_iters=50, power=1.0)

    def shares(iterations):
        return annealing.shares(torch.tensor(iterations)).tolist()

    assert shares(0) == shares(10) == [1, 1, 1]  # the first of five parts
    assert shares(15) == [0.5, 1, 1]
    assert shares(25) == [0, 0.5, 1]
    assert shares(40) == shares(50) == shares(80) == [0, 0, 0]  # the last one
    steps = torch.tensor([shares(i) for i in range(60)])
    assert (steps.diff(dim=0) <= 0).all() and (steps.diff(dim=1) >= 0).all()


def test_training_passes_advance_it_and_checkpoints_keep_it():
    annealing = MaskAnnealing(num_blocks=1, total_iters=3, power=0.9)
    seen = [annealing.advance()[0] for _ in range(4)]
    assert seen == pytest.approx([1, 1, 0, 0])
    with torch.no_grad():
        annealing.advance()
    assert annealing.iterations == 4
    other = MaskAnnealing(num_blocks=1, total_iters=3)
    other.load_state_dict(annealing.state_dict())
    assert other.advance() == [0]


@pytest.mark.parametrize('arguments', [dict(total_iters=0), dict(total_iters=5, power=-1.0)])
def test_errors(arguments):
    with pytest.raises(ValueError, match=r'annealing: \w+ must be above 0, got'):
        MaskAnnealing(3, **arguments)
