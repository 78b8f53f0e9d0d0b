"""Modules that convert weights when they are loaded, in any way, and refuse what does not fit."""

import logging

from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor

from ..arguments import CheckedArguments, entries_of, is_pretrained
from .download import find_local
from .fit import adopt_grids, has_grids
from .load import fit_to, load_into
from .reader import find_weights, read_checkpoint
from .report import shorten

WRAPPED = ('_fsdp_wrapped_module', '_flat_param')  # parts of names that checkpoints do not have


class CheckpointedModule(BaseModule, metaclass=CheckedArguments):
    """A ``BaseModule`` that reads checkpoints with :func:`~mmtoken.checkpoints.load_into`.

    MMEngine does not rename, and only warns where nothing fits: training then starts from random
    weights. Here each ``Pretrained`` entry of ``init_cfg``, in any form that MMEngine allows, fits
    or is an error. It is loaded after all other initialization.
    """

    usual_prefix = 'neck.'  # of its names in a whole model

    def after_construction(self) -> None:
        """Called once, after the constructors of all subclasses."""

    def init_weights(self) -> None:
        """Initialize, then load the checkpoints of ``init_cfg`` in order.

        Raises:
            OSError, ValueError: A checkpoint does not exist or does not fit, see
                :func:`~mmtoken.checkpoints.load_into`.
        """
        if self.is_init:
            return
        init_cfg = self.init_cfg
        entries = entries_of(init_cfg)
        self.init_cfg = [entry for entry in entries if not is_pretrained(entry)] or None
        try:
            self.init_fresh()
        finally:
            self.init_cfg = init_cfg
            self.is_init = False  # so that it can be called again after an error below
        for entry in filter(is_pretrained, entries):
            load_into(self, entry['checkpoint'], entry.get('prefix'))
        self.is_init = True

    def _dump_init_info(self) -> None:
        """Nothing: MMEngine would log hundreds of lines wherever a module of ours stands alone."""

    def init_fresh(self) -> None:
        """Initialize without checkpoints: ``init_cfg`` has no ``Pretrained`` entry here."""
        super().init_weights()


class CheckpointedBackbone(CheckpointedModule):
    """A backbone that converts every state dict to its own names and shapes before loading it.

    ``load_from``, ``resume``, ``test.py`` and ``load_state_dict`` therefore do as ``init_cfg``:
    foreign names are converted, bias tables resized, and the position embedding takes the grid of
    the file. A part of the weights is loaded with a warning that lists the others; weights of
    another model are an error.
    """

    usual_prefix = 'backbone.'

    def after_construction(self) -> None:
        """Give positions the grid of the checkpoint in ``init_cfg``, if it is on disk already.

        Optimizers, averaged copies (EMA) and DDP keep the shapes that parameters have when they
        are created, which is before MMEngine loads weights.
        """
        if not has_grids(self):
            return
        for entry in filter(is_pretrained, entries_of(self.init_cfg)):
            try:
                file = find_local(entry['checkpoint'])
                if file is not None:
                    weights = find_weights(read_checkpoint(file), file)
                    adopt_grids(self, fit_to(self, weights, file, entry.get('prefix'))[1].grids)
            except (OSError, ValueError):
                continue  # init_weights raises the same; testing does not need the file

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        given = {name: t for name, t in state_dict.items() if name.startswith(prefix)}
        fitted = self._fit_state({n[len(prefix) :]: t for n, t in given.items()}, prefix)
        if fitted is not None:
            for name in given:
                del state_dict[name]
            state_dict.update({prefix + name: tensor for name, tensor in fitted.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit_state(self, given: dict[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
        """Converted tensors; None if they need no conversion, or cannot be converted but loaded.

        Raises:
            ValueError: They are of another model, or have other shapes.
        """
        own = {name: tensor.shape for name, tensor in self.state_dict(keep_vars=True).items()}
        if any(part in name for name in own for part in WRAPPED):
            return None
        name = f'{type(self).__name__}{f" ({prefix[:-1]})" if prefix else ""}'
        fits = {n for n, tensor in given.items() if own.get(n) == tensor.shape}
        if fits == own.keys() == given.keys():
            return None
        try:
            file = f'the state dict for {name}'
            state, report = fit_to(self, given, file, '' if prefix else None)
        except ValueError:
            if len(fits) == len(given):
                missing = [n for n in own if n not in given]
                _warn(
                    f'{name}: the state dict lacks {len(missing)} of {len(own)} tensors, which '
                    f'stay as they are: {", ".join(shorten(missing))}'
                )
            elif fits != own.keys():  # otherwise load_state_dict reports the excess
                raise
            return None
        if report.grids and get_world_size() > 1:
            _warn(
                f'{name}: {report.describe_grids()}; if the model was wrapped for distributed '
                'training before, its first backward will fail: set img_size in the config'
            )
        adopt_grids(self, report.grids)
        print_log(f'{name}: {report.summary()}', logger='current')
        return state


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)
