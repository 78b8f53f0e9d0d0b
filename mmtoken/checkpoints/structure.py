"""Initialize structured layers from plain ones, so that a block computes the same as the plain one.

This is ours: SWAT (arXiv 2111.13677) trains from scratch. Its stem and its patch merging are other
functions than the plain ones, and stay newly initialized.
"""

from torch import Tensor

from .report import Report

State = dict[str, Tensor]

# A larger one gains nothing in float32 and costs digits in half precision.
LIFT = 8.0


def structure_layers(state: State, own: State, report: Report) -> None:
    """Convert plain layers in ``state`` to structured ones where ``own`` has those.

    Args:
        state: Tensors of a file by our names; changed in place.
        own: Those of the model.
        report: Is updated.
    """
    _double_linear_layers(state, own, report)
    _pass_convolutions(state, own, report)
    _leave_merging(state, own, report)


def _double_linear_layers(state: State, own: State, report: Report) -> None:
    """``(A + V) / 2`` of a Linear layer A and a convolution V is ``W`` for ``A = 2 W``, ``V = 0``.

    Multiplying by two changes no digit, so this is exact.
    """
    for name in list(state):
        layer, _, kind = name.rpartition('.')
        linear, conv = f'{layer}.linear.{kind}', f'{layer}.conv.{kind}'
        if name in own or linear in state or not {linear, conv} <= own.keys():
            continue
        state[linear] = 2 * state.pop(name)
        state[conv] = state[linear].new_zeros(own[conv].shape)
        report.mapped[linear] = report.mapped.pop(name)
        report.identity_init.append(conv)


def _pass_convolutions(state: State, own: State, report: Report) -> None:
    """Make the depth-wise convolution of an MLP, and one of its two GELUs, the identity.

    A kernel with a single 1, in the middle, is the identity. So that the GELU before it is one too,
    the bias of the first layer adds 8 to all channels, and the bias of the convolution subtracts
    it: ``gelu(gelu(h + 8) - 8)`` and ``gelu(h)`` differ by 7e-8 at most, for any ``h``. For ``h``
    above about -4 the inner GELU is the identity; below, the outer one gives zero, as it should.

    Adding 8 behind the first GELU, and subtracting it in the second layer, is exact too; but then
    all inputs of that layer have one sign, and Adam's first steps are too large.

    In half precision the sum costs digits: between 8 and 16 numbers are 1/16 apart in bfloat16 and
    1/128 in float16. The output of an MLP has an error of 1 to 6 % at the start with the former,
    where 0.5 % is usual, and of 0.1 to 0.7 % with the latter.
    """
    for name in own:
        mlp = name.removesuffix('dwconv.weight')
        lifted, bias = f'{mlp}fc1.bias', f'{mlp}dwconv.bias'
        if mlp == name or lifted not in state or {name, bias} & state.keys():
            continue
        hidden, shape = state[lifted], own[name].shape
        state[name] = hidden.new_zeros(shape)
        state[name][:, :, shape[2] // 2, shape[3] // 2] = 1
        state[bias] = hidden.new_full(own[bias].shape, -LIFT)
        state[lifted] = (hidden.double() + LIFT).to(own[lifted].dtype)
        report.identity_init += [name, bias]


def _leave_merging(state: State, own: State, report: Report) -> None:
    """Drop the Linear layer of patch merging, and its norm, where the model has a convolution."""
    for name in own:
        layer = name.removesuffix('downsample.reduction.weight')
        if layer == name or own[name].ndim == 2 or name not in state or state[name].ndim != 2:
            continue
        for part in [part for part in own if part.startswith(f'{layer}downsample.')]:
            if part in state:
                del state[part]
                report.dropped.append(report.mapped.pop(part))
            report.newly_initialized.append(part)
