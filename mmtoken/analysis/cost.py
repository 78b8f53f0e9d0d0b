"""What a model costs: multiply-accumulates by stage and kind of work, and parameters.

Costs are counted on the reference path
(:func:`~mmtoken.runtime.reference.reference_path`), which computes what the method says and no
more, for sparse models and dense twins alike. A fast path may execute more (pairs of tokens that a
mask hides) or less (padding that is not projected); its count is kept beside.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ..layers.common.plain import hooks_ignored
from ..runtime.decisions import record_routing
from ..runtime.reference import reference_path
from .decisions import coarse_ratio, query_ratio
from .macs import count_macs, make_counter

KINDS = ('linear', 'convolution', 'attention')


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass, for one image: the mean over a batch, rounded down.

    Attributes:
        macs: Multiply-accumulates on the reference path.
        executed: Multiply-accumulates that the fast path executes.
        parameters: Elements of all parameters.
        stages: Part of the model, such as ``'layers.2'``, to kind of work to its share of ``macs``.
        query_ratio: Queries over tokens, of all blocks that choose; None if none does. For MSViT,
            tokens over fine ones.
        coarse_ratio: Regions that chose the coarsest over regions, likewise.
    """

    macs: int
    executed: int
    parameters: int
    stages: dict[str, dict[str, int]]
    query_ratio: float | None = None
    coarse_ratio: float | None = None

    def by_kind(self) -> dict[str, int]:
        """Multiply-accumulates of each kind of work."""
        return {kind: sum(stage[kind] for stage in self.stages.values()) for kind in KINDS}

    def to_dict(self) -> dict:
        """For JSON; ``executed_extra`` is the signed difference to the reference path."""
        return asdict(self) | dict(executed_extra=self.executed - self.macs, kinds=self.by_kind())


def measure_cost(
    module: nn.Module,
    *inputs,
    root: nn.Module | None = None,
    batch_size: int = 1,
    inside: Callable[[], AbstractContextManager] = nullcontext,
) -> Cost:
    """Count one forward pass on both paths.

    Args:
        module: A model, in eval mode.
        inputs: What it is called with.
        root: The submodule whose parts are told apart in ``stages``, by default the module itself.
        batch_size: Images in the inputs. The cost is that of one, the mean.
        inside: Makes a context that each path runs inside of.
    """
    with inside(), reference_path():
        stages = macs_by_stage(module, *inputs, root=root, batch_size=batch_size)
    with inside(), record_routing() as decisions:
        executed = count_macs(module, *inputs)
    return Cost(
        macs=sum(sum(kinds.values()) for kinds in stages.values()),
        executed=executed // batch_size,
        parameters=sum(p.numel() for p in module.parameters()),
        stages=stages,
        query_ratio=query_ratio(decisions) if decisions else None,
        coarse_ratio=coarse_ratio(decisions) if decisions else None,
    )


def macs_by_stage(
    module: nn.Module, *inputs, root: nn.Module | None = None, batch_size: int = 1
) -> dict[str, dict[str, int]]:
    """Multiply-accumulates of a forward pass by part of the model and kind of work.

    Args:
        module, inputs, root, batch_size: As for :func:`measure_cost`.

    Returns:
        ``{part: {kind: macs}}``, in the order of :func:`stage_names`. Parts that do no such work
        are left out; what runs outside of all parts is called ``'other'``.
    """
    root = root or module
    parts = stage_names(root)
    stages = {part: dict.fromkeys(KINDS, 0) for part in [*parts, 'other']}
    for (name, kind), flops in _Ledger().record(module, root, inputs).items():
        part = next((p for p in parts if f'{name}.'.startswith(f'{p}.')), 'other')
        stages[part][kind] += flops
    return {
        part: {kind: flops // (2 * batch_size) for kind, flops in kinds.items()}
        for part, kinds in stages.items()
        if any(kinds.values())
    }


def stage_names(module: nn.Module) -> list[str]:
    """Names of a model's direct children, and of the members of lists among them."""
    names = []
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            names += [f'{name}.{i}' for i in range(len(child))]
        else:
            names.append(name)
    return names


class _Ledger:
    """Books each operation on the innermost module that runs.

    Torch's own book-keeping by module differs between versions, and the older one unwraps tuples
    that modules return. Here hooks read the running total whenever a module starts or ends.
    """

    def __init__(self) -> None:
        self.counter = make_counter()
        self.running: list[tuple[str, nn.Module | None]] = [('', None)]
        self.total: Counter = Counter()
        self.flops: dict[tuple[str, str], int] = defaultdict(int)

    def record(
        self, module: nn.Module, root: nn.Module, inputs: tuple
    ) -> dict[tuple[str, str], int]:
        """Run a module: ``{(submodule of root, kind of work): floating-point operations}``."""
        hooks = []
        for name, child in root.named_modules():
            hooks.append(child.register_forward_pre_hook(self._starts(name)))
            hooks.append(child.register_forward_hook(self._ends))
        try:
            with torch.no_grad(), hooks_ignored(), self.counter:
                module(*inputs)
            self._settle()
        finally:
            for hook in hooks:
                hook.remove()
        return self.flops

    def _starts(self, name: str):
        def hook(module, inputs) -> None:
            self._settle()
            self.running.append((name, module))

        return hook

    def _ends(self, module, inputs, outputs) -> None:
        self._settle()
        self.running.pop()

    def _settle(self) -> None:
        name, module = self.running[-1]
        total = Counter(self.counter.get_flop_counts().get('Global', {}))
        for operation, flops in (total - self.total).items():
            self.flops[name, _kind(str(operation), module)] += flops
        self.total = total


def _kind(operation: str, module: nn.Module | None) -> str:
    """Kind of work of an operation such as ``'aten.addmm'`` that runs inside ``module``."""
    if 'attention' in operation:
        return 'attention'
    if 'conv' in operation:
        return 'convolution'
    # Attention that is not fused is a product of batches; so is a Linear layer on odd strides.
    batched = 'bmm' in operation
    return 'attention' if batched and not isinstance(module, nn.Linear) else 'linear'
