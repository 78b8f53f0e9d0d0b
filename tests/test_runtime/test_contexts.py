"""Two threads with two models do not see each other's switches, records and losses."""

import threading
from functools import partial

import pytest
import torch

import mmtoken
from mmtoken.backbones import DGEPVT, MSViT
from mmtoken.layers.common.plain import all_plain, hooks_ignored
from mmtoken.runtime.decisions import record_routing
from mmtoken.runtime.reference import on_reference_path, reference_path

ARCH = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
PYRAMID = dict(
    embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1)
)


def run_together(*jobs):
    """Run jobs in threads; each waits for the others once it is inside its contexts."""
    barrier, results = threading.Barrier(len(jobs), timeout=60), [None] * len(jobs)

    def run(i, job):
        try:
            results[i] = job(barrier)
        except BaseException as error:
            barrier.abort()
            results[i] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_two_models_in_two_threads():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    msvit, dge = MSViT(ARCH).train(), DGEPVT(PYRAMID, out_indices=(0, 1)).train()

    def train(model, override, barrier):
        with override, record_routing() as record, mmtoken.token_losses() as losses:
            barrier.wait()
            for _ in range(3):
                model(images)
            barrier.wait()
        return record, losses

    train_msvit = partial(train, msvit, mmtoken.routing_override(coarse_ratio=0.5))
    train_dge = partial(train, dge, mmtoken.routing_override(query_ratio=0.5))
    (scales, gate_losses), (cells, budget_losses) = run_together(train_msvit, train_dge)
    assert [decision.per_network for decision in scales] == [True] * 3
    assert [decision.per_network for decision in cells] == [False] * 6
    assert 'loss_gate' in gate_losses and 'loss_budget' not in gate_losses
    assert 'loss_budget' in budget_losses and 'loss_gate' not in budget_losses


def test_switches_hold_in_one_thread():
    layer = torch.nn.Linear(2, 2)
    layer.register_forward_hook(lambda *args: None)

    def switched(barrier):
        with reference_path(), hooks_ignored():
            barrier.wait()
            seen = on_reference_path(), all_plain(layer)
            barrier.wait()
        return seen

    def ordinary(barrier):
        barrier.wait()
        seen = on_reference_path(), all_plain(layer)
        barrier.wait()
        return seen

    assert run_together(switched, ordinary) == [(True, True), (False, False)]


def test_a_thread_without_a_collector_is_told():
    model, images = MSViT(ARCH).train(), torch.randn(1, 3, 64, 64)

    def collects(barrier):
        with mmtoken.token_losses():
            barrier.wait()
            barrier.wait()

    def does_not(barrier):
        barrier.wait()
        try:
            with pytest.raises(RuntimeError, match='token_losses'):
                model(images)
        finally:
            barrier.wait()

    run_together(collects, does_not)
