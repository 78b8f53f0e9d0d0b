"""What a model costs: multiply-accumulates by part and kind of work, and parameters.

Costs are counted on the reference path (:func:`~mmtoken.runtime.reference.reference_path`), which
computes exactly what the method defines, for sparse models and dense twins alike. A fast path may
execute more (pairs of tokens that a mask hides) or less (padding that is not projected); its count
is given as ``executed``.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from ..layers.common.plain import hooks_ignored
from ..runtime.decisions import record_routing
from ..runtime.reference import reference_path
from .decisions import measured_ratios
from .macs import count_macs, make_counter

KINDS = ('linear', 'convolution', 'attention')


@dataclass(frozen=True)
class Cost:
    """Cost of a forward pass per image: the mean over a batch, rounded down.

    Attributes:
        macs: Multiply-accumulates on the reference path.
        executed: Multiply-accumulates that the fast path executes.
        parameters: Number of parameters.
        stages: Part of the model, such as ``'layers.2'``, to kind of work to its share of ``macs``.
        ratios: From :func:`~mmtoken.analysis.decisions.measured_ratios`; empty for a model that
            makes no routing decisions.
    """

    macs: int
    executed: int
    parameters: int
    stages: dict[str, dict[str, int]]
    ratios: dict[str, float] = field(default_factory=dict)

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
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Cost:
    """Count a forward pass on the reference path and on the fast path.

    Args:
        module: A model, in eval mode.
        inputs: Its inputs.
        root: The submodule whose parts are counted separately, by default the module itself.
        batch_size: Images in the inputs. The cost is the mean over them.
        context: Makes a context manager, such as a routing override; each pass runs in a new one.
    """
    with context(), reference_path():
        stages = macs_by_stage(module, *inputs, root=root, batch_size=batch_size)
    with context(), record_routing() as decisions:
        executed = count_macs(module, *inputs)
    return Cost(
        macs=sum(sum(kinds.values()) for kinds in stages.values()),
        executed=executed // batch_size,
        parameters=sum(p.numel() for p in module.parameters()),
        stages=stages,
        ratios=measured_ratios(decisions),
    )


def macs_by_stage(
    module: nn.Module, *inputs, root: nn.Module | None = None, batch_size: int = 1
) -> dict[str, dict[str, int]]:
    """Multiply-accumulates of a forward pass by part of the model and kind of work.

    Args:
        module, inputs, root, batch_size: See :func:`measure_cost`.

    Returns:
        ``{part: {kind: macs}}``, in the order of :func:`stage_names`. Parts without such work are
        left out; what runs outside of all parts is called ``'other'``.
    """
    root = root or module
    parts = stage_names(root)
    stages = {part: dict.fromkeys(KINDS, 0) for part in [*parts, 'other']}
    for (name, kind), flops in _flops_by_module(module, root, inputs).items():
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


def _flops_by_module(
    module: nn.Module, root: nn.Module, inputs: tuple
) -> dict[tuple[str, str], int]:
    """Operations of a forward pass: ``{(innermost submodule of root, kind of work): flops}``.

    Torch's own count by module differs between versions, and torch 2.1 unwraps tuples that modules
    return. So hooks read its running total whenever a module starts or ends.
    """
    counter, counted, flops = make_counter(), Counter(), Counter()
    running: list[tuple[str, nn.Module | None]] = [('', None)]

    def count() -> None:
        name, innermost = running[-1]
        total = Counter(counter.get_flop_counts().get('Global', {}))
        for operation, number in (total - counted).items():
            flops[name, _kind(str(operation), innermost)] += number
        counted.update(total - counted)

    def start(child, name) -> None:
        count()
        running.append((name, child))

    def end(child, inputs, outputs) -> None:
        count()
        running.pop()

    hooks = []
    for name, child in root.named_modules():
        hooks += [
            child.register_forward_pre_hook(lambda child, _, name=name: start(child, name)),
            child.register_forward_hook(end),
        ]
    try:
        with torch.no_grad(), hooks_ignored(), counter:
            module(*inputs)
        count()
    finally:
        for hook in hooks:
            hook.remove()
    return flops


def _kind(operation: str, module: nn.Module | None) -> str:
    """Kind of work of an operation such as ``'aten.addmm'`` that runs inside ``module``."""
    if 'attention' in operation:
        return 'attention'
    if 'conv' in operation:
        return 'convolution'
    # Attention that is not fused is a batched product; so is nn.Linear on some memory layouts.
    batched = 'bmm' in operation
    return 'attention' if batched and not isinstance(module, nn.Linear) else 'linear'
