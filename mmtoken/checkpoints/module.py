"""A module that takes weights rightly, or refuses them, by whichever road they come."""

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

WRAPPED = ('_fsdp_wrapped_module', '_flat_param')  # names that are not those of checkpoints


class CheckpointedModule(BaseModule, metaclass=CheckedArguments):
    """A ``BaseModule`` that reads checkpoints with :func:`~mmtoken.checkpoints.load_into`.

    MMEngine loads without strictness and without renaming: where nothing fits it warns, and
    training starts from random weights. Here each ``Pretrained`` entry of ``init_cfg``, in any
    form that MMEngine allows, fits or is an error, and has the last word over all initialisation.
    """

    usual_prefix = 'neck.'  # of its names in a whole model

    def after_construction(self) -> None:
        """Called once, when the constructors of all subclasses are through."""

    def init_weights(self) -> None:
        """Initialise, then load the checkpoints that ``init_cfg`` names, in their order.

        Raises:
            FileNotFoundError, OSError, ValueError: A checkpoint is not there or does not fit; see
                :func:`~mmtoken.checkpoints.load_into`.
        """
        if self.is_init:
            return
        init_cfg = self.init_cfg
        entries = entries_of(init_cfg)
        self.init_cfg = [entry for entry in entries if not is_pretrained(entry)] or None
        self._awaits_checkpoint = any(map(is_pretrained, entries))
        try:
            self.init_fresh()
        finally:
            self.init_cfg = init_cfg
            self.is_init = False  # a checkpoint that fails leaves it to be tried again
        for entry in filter(is_pretrained, entries):
            load_into(self, entry['checkpoint'], entry.get('prefix'))
        self.is_init = True

    def _dump_init_info(self) -> None:
        """MMEngine's list of how each parameter was initialised, where no checkpoint follows."""
        if not self._awaits_checkpoint:
            super()._dump_init_info()

    def init_fresh(self) -> None:
        """Initialise without checkpoints: ``init_cfg`` holds no ``Pretrained`` entry here."""
        super().init_weights()


class CheckpointedBackbone(CheckpointedModule):
    """Any state dict is brought to the names and shapes of this backbone before it is loaded.

    So ``load_from``, ``resume``, ``test.py`` and ``load_state_dict`` do what ``init_cfg`` does:
    foreign names are converted, bias tables resized, and the position embedding takes the grid of
    the file. They may come with a part of the weights, with a warning of what stays as it was;
    weights of something else are an error.
    """

    usual_prefix = 'backbone.'

    def after_construction(self) -> None:
        """Lay positions out as in the checkpoint of ``init_cfg``, if it is on disk already.

        Optimizers, averaged copies (EMA) and DDP keep the shapes that parameters have when they
        are made, which is before MMEngine loads weights.
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
                continue  # init_weights meets the same and says so; a test needs no such file

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        given = {name: t for name, t in state_dict.items() if name.startswith(prefix)}
        fitted = self._fit_state({n[len(prefix) :]: t for n, t in given.items()}, prefix)
        if fitted is not None:
            for name in given:
                del state_dict[name]
            state_dict.update({prefix + name: tensor for name, tensor in fitted.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit_state(self, given: dict[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
        """Tensors as they are to be loaded; None if they are so already.

        Raises:
            ValueError: They are of something else, or of another shape.
        """
        own = {name: tensor.shape for name, tensor in self.state_dict(keep_vars=True).items()}
        if any(mark in name for name in own for mark in WRAPPED):
            return None
        name = f'{type(self).__name__}{f" ({prefix[:-1]})" if prefix else ""}'
        fits = {n for n, tensor in given.items() if own.get(n) == tensor.shape}
        if fits == own.keys() == given.keys():
            return None
        try:
            state, report = fit_to(
                self, given, f'the state dict for {name}', '' if prefix else None
            )
        except ValueError:
            if len(fits) == len(given):
                self._warn_of_missing([n for n in own if n not in given], len(own), name)
                return None
            if fits == own.keys():
                return None  # whoever loads is told of what there is beyond that
            raise
        if report.grids and get_world_size() > 1:
            print_log(
                f'{name}: {report.describe_grids()}; if the model was wrapped for distributed '
                'training before, its first backward will fail: say so in the config',
                logger='current',
                level=logging.WARNING,
            )
        adopt_grids(self, report.grids)
        print_log(f'{name}: {report.summary()}', logger='current')
        return state

    @staticmethod
    def _warn_of_missing(missing: list[str], total: int, name: str) -> None:
        few = ', '.join(missing[:4]) + (', ...' if len(missing) > 4 else '')
        print_log(
            f'{name}: the state dict lacks {len(missing)} of {total} tensors, which stay as they '
            f'are: {few}',
            logger='current',
            level=logging.WARNING,
        )
