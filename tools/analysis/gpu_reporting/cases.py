"""What is measured, the most important first."""

from collections.abc import Iterator
from dataclasses import dataclass

from .kernels import KERNELS
from .networks import MAIN, NETWORKS

BATCH_SIZES = (8, 1)
QUICK_BATCH_SIZES = (2, 1)
DTYPES = ('bfloat16', 'float32')


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        kind: ``'forward'``, ``'parity'``, ``'training'``, ``'captured'``, ``'compiled'``, or the
            name of a kernel comparison.
        name: Of a network, or of one form of a kernel.
        size: Architecture of the network; for kernels their inputs: ``'tiny'`` or ``'small'``.
        dtype: Precision.
        batch_size: Images in a batch.
    """

    kind: str
    name: str
    size: str
    dtype: str
    batch_size: int

    def __str__(self) -> str:
        return f'{self.kind}: {self.name} {self.size}, {self.setting}'

    @property
    def setting(self) -> str:
        return f'{self.dtype} x {self.batch_size}'


def list_cases(device: str, quick: bool = False) -> list[Case]:
    """All cases of a report, in order.

    Compiled networks come last: one of them takes as long as ten other cases.

    Args:
        device: ``'cuda'``, or ``'cpu'``, which has no CUDA graphs, no kernel for sequences of
            unequal lengths, and no compiled cases.
        quick: Tiny networks and batches.
    """
    large, one = QUICK_BATCH_SIZES if quick else BATCH_SIZES
    half, full = DTYPES
    small = {name: 'tiny' if quick else net.sizes[0] for name, net in NETWORKS.items()}
    static = [name for name, network in NETWORKS.items() if not network.chooses]
    others = [name for name in NETWORKS if name not in MAIN]

    def each(kind: str, names, dtype: str, batch_size: int) -> Iterator[Case]:
        return (Case(kind, name, small[name], dtype, batch_size) for name in names)

    cases = [
        *each('forward', MAIN, half, large),
        *each('parity', NETWORKS, full, one),
        *each('parity', NETWORKS, half, one),
        *each('forward', others, half, large),
        *each('forward', NETWORKS, half, one),
        *each('training', NETWORKS, half, large),
        *each('forward', NETWORKS, full, large),
    ]
    if device == 'cuda':
        cases += each('captured', static, half, one)
    for kernel, forms in KERNELS.items():
        size = 'tiny' if quick else 'small'
        names = (name for name, form in forms.items() if device == 'cuda' or form.on_cpu)
        cases += (Case(kernel, name, size, half, large) for name in names)
    if not quick:
        base = [(name, net.sizes[1]) for name, net in NETWORKS.items() if len(net.sizes) > 1]
        for kind, batch_size in (('forward', large), ('training', large), ('forward', one)):
            cases += (Case(kind, name, size, half, batch_size) for name, size in base)
        cases += each('training', NETWORKS, full, one)
        cases += each('forward', NETWORKS, full, one)
    if device == 'cuda':
        cases += each('compiled', MAIN, half, large)
        cases += each('compiled', others, half, large)
    return cases
