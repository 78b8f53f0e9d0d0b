"""A hook with which a training that was interrupted goes on as if it had not been."""

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..arguments import KnownArguments
from ..registry import HOOKS

KEY = 'random_states'  # in a checkpoint

State = dict[str, Any]


@HOOKS.register_module()
class RandomStateHook(Hook, metaclass=KnownArguments):
    """Saves the states of all random generators in checkpoints, and restores them with ``resume``.

    MMEngine restores weights, optimizer and schedules, but no generator, so noise of routers,
    stochastic depth and augmentation go on differently. In a config::

        default_hooks = dict(random_states=dict(type='mmtoken.RandomStateHook'))

    With it, and a seed (``randomness = dict(seed=0)``), the rest of an interrupted training is
    bit-equal to that of an uninterrupted one on the same machine, where computation itself is
    deterministic. Two things are out of its reach: augmentation in worker processes of an
    iteration-based training, or of an epoch-based one with ``persistent_workers=True``, since
    workers have generators of their own.

    Validation no longer changes what training draws, since a training that goes on from a
    checkpoint does not repeat the validation behind it.
    """

    priority = 'LOW'  # before CheckpointHook

    def __init__(self) -> None:
        self._of_processes: list[State] | None = None  # where there are several
        self._resumed: list[State] | None = None  # of the checkpoint
        self._state: State | None = None  # of it, to be restored in this process
        self._before_validation: State | None = None

    def after_train_iter(self, runner: Runner, batch_idx: int, *args, **kwargs) -> None:
        """Collect the states of all processes, before one of them saves a checkpoint."""
        self._collect(runner, by_epoch=False)

    def after_train_epoch(self, runner: Runner) -> None:
        """Likewise."""
        self._collect(runner, by_epoch=True)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the states of all processes to a checkpoint."""
        if get_world_size() == 1:
            states = [self._before_validation or get_states()]
        else:
            states = self._of_processes
        if states is not None:
            checkpoint[KEY] = states

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember the states of a checkpoint."""
        self._resumed = checkpoint.get(KEY)

    def before_train(self, runner: Runner) -> None:
        """Look at the states of the checkpoint, if training goes on from one."""
        states, self._resumed = self._resumed, None
        if runner.iter == 0:  # weights to start from, not a training to go on with
            return
        if states is None:
            _warn(
                'the checkpoint has no random states: this training will differ from one that was '
                'not interrupted'
            )
        elif len(states) != get_world_size():
            _warn(
                f'the checkpoint has random states of {len(states)} processes, there are '
                f'{get_world_size()}: this training will differ from one that was not interrupted'
            )
        else:
            self._state = states[get_rank()]

    def before_train_epoch(self, runner: Runner) -> None:
        """Restore them, behind whatever other hooks draw when training begins."""
        state, self._state = self._state, None
        if state is None:
            return
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            set_states(state)
        else:  # it first skips the data that have been seen, which may draw random numbers
            iterator = loop.dataloader_iterator
            # mmengine 0.10.7 takes them one by one, as those to come; onedl-mmengine has a method.
            skipped = 0 if hasattr(iterator, 'skip_iter') else runner.iter
            loop.dataloader_iterator = _Restoring(iterator, loop.dataloader, state, skipped)

    def before_val(self, runner: Runner) -> None:
        """Remember the states during validation."""
        self._before_validation = get_states()

    def after_val(self, runner: Runner) -> None:
        """Go on from those before validation."""
        set_states(self._before_validation)
        self._before_validation = None

    def _collect(self, runner: Runner, by_epoch: bool) -> None:
        if get_world_size() > 1 and any(
            isinstance(hook, CheckpointHook) and is_due(hook, runner, by_epoch)
            for hook in runner.hooks
        ):
            self._of_processes = all_gather_object(get_states())


class _Restoring:
    """An iterator over data that sets the states of generators before an item.

    ``skipped`` items come before that one.

    A data loader draws when it starts. One that only starts now had drawn before it was
    interrupted, so it does from a generator of its own; one that starts again, at the end of its
    data, draws as it would have.
    """

    def __init__(self, iterator: Iterator, loader: DataLoader, state: State, skipped: int) -> None:
        self._iterator, self._loader, self._state = iterator, loader, state
        self._skipped = skipped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def __next__(self) -> Any:
        if self._state is None:
            return next(self._iterator)
        if self._skipped:
            self._skipped -= 1
            return next(self._iterator)
        own = self._loader.generator
        # onedl-mmengine starts it behind the data that a sampler skipped; mmengine 0.10.7 at once.
        if getattr(self._iterator, '_iterator', self._loader) is None:
            self._loader.generator = torch.Generator().manual_seed(torch.initial_seed())
        set_states(self._state)
        self._state = None
        item = next(self._iterator)
        self._loader.generator = own
        return item


def is_due(hook: CheckpointHook, runner: Runner, by_epoch: bool) -> bool:
    """Whether a checkpoint is saved after this iteration or epoch."""
    if hook.by_epoch != by_epoch:
        return False
    if by_epoch:
        every, last = hook.every_n_epochs, hook.is_last_train_epoch(runner)
    else:
        every, last = hook.every_n_train_iters, hook.is_last_train_iter(runner)
    return every(runner, hook.interval) or (hook.save_last and last)


def get_states() -> State:
    """States of the generators of Python, NumPy and torch, as tensors and numbers."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = dict(
        torch=torch.get_rng_state(),
        python=dict(version=version, words=torch.tensor(words), gauss=gauss),
        numpy=dict(
            kind=kind,
            keys=torch.from_numpy(keys.astype(np.int64)),
            position=int(position),
            has_gauss=int(has_gauss),
            cached=float(cached),
        ),
    )
    if torch.cuda.is_available():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def set_states(states: State) -> None:
    """Set what :func:`get_states` returned."""
    torch.set_rng_state(states['torch'].cpu())
    python, numpy = states['python'], states['numpy']
    random.setstate((python['version'], tuple(python['words'].tolist()), python['gauss']))
    keys = numpy['keys'].cpu().numpy().astype(np.uint32)
    np.random.set_state(
        (numpy['kind'], keys, numpy['position'], numpy['has_gauss'], numpy['cached'])
    )
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())


def _warn(message: str) -> None:
    print_log(f'RandomStateHook: {message}', logger='current', level=logging.WARNING)
