"""Nothing in a file is run when it is read."""

import os
import sys

import pytest
import torch

from mmtoken.checkpoints import find_weights, read_checkpoint
from mmtoken.checkpoints.restricted_unpickler import KNOWN_NAMES, Inert, is_torchscript


class Calls:
    def __init__(self, function, *args):
        self.called = function, args

    def __reduce__(self):
        return self.called


def hostile_objects(marker):
    code = f'open({str(marker)!r}, "w").close()'
    return dict(
        system=Calls(os.system, f'touch {marker}'),
        eval=Calls(eval, code),
        exec=Calls(exec, code),
        open=Calls(open, str(marker), 'w'),
        attribute=Calls(getattr, 'x', 'upper'),
        torch=Calls(torch.save, 1, str(marker)),
        module=Calls(__import__, 'antigravity'),
    )


@pytest.mark.parametrize('protocol', [2, 4])
def test_hostile_objects_do_nothing(protocol, kind, tmp_path, save):
    marker = tmp_path / 'was-here'
    content = dict(hostile_objects(marker), state_dict=dict(weight=torch.ones(2)))
    found = read_checkpoint(save(content, pickle_protocol=protocol, **kind))
    assert not marker.exists() and 'antigravity' not in sys.modules
    assert torch.equal(find_weights(found, 'file')['weight'], torch.ones(2))
    assert all(isinstance(v, Inert) for k, v in found.items() if k != 'state_dict')


def glob(module, name):
    return b'c' + module.encode() + b'\n' + name.encode() + b'\n'


def stack_global(module, name):
    return b''.join(
        b'\x8c' + bytes([len(text)]) + text.encode() for text in (module, name)
    ) + b'\x93'  # fmt: skip


REBUILD = ('torch._utils', '_rebuild_parameter')
ATTRIBUTES = b'}X\x0c\x00\x00\x00__defaults__K\x01\x85s'  # {'__defaults__': (1,)}
TAMPERING = dict(
    # BUILD with the state (None, {...}) sets attributes of what is on the stack.
    of_a_rebuilder=glob(*REBUILD) + b'N' + ATTRIBUTES + b'\x86b.',
    of_a_rebuilder_in_protocol_4=stack_global(*REBUILD) + b'N' + ATTRIBUTES + b'\x86b.',
    of_a_dictionary=glob('collections', 'OrderedDict') + b')R' + ATTRIBUTES + b'b.',
    of_the_class=glob('collections', 'OrderedDict') + b'N' + ATTRIBUTES + b'\x86b.',
    of_a_module=glob('os', 'path') + b'N' + ATTRIBUTES + b'\x86b.',
    of_a_nested_name=stack_global('torch', '_utils._rebuild_parameter')
    + b'N' + ATTRIBUTES + b'\x86b.',
)  # fmt: skip


@pytest.mark.parametrize('name', TAMPERING)
def test_functions_and_classes_cannot_be_changed(name, save_pickle):
    before = torch._utils._rebuild_parameter.__defaults__
    sealed = {key: type(value) for key, value in KNOWN_NAMES.items()}
    try:
        found = read_checkpoint(save_pickle(b'\x80\x04' + TAMPERING[name]))
    except ValueError:
        found = None
    assert torch._utils._rebuild_parameter.__defaults__ == before
    assert not hasattr(os.path, '__defaults__') and not hasattr(type(found), '__defaults__')
    assert sealed == {key: type(value) for key, value in KNOWN_NAMES.items()}


def test_call_of_what_a_call_returned(save_pickle, tmp_path):
    """``getattr(os, 'system')('touch ...')``."""
    marker = tmp_path / 'was-here'
    command = f'touch {marker}'.encode()
    pickled = (
        glob('builtins', 'getattr') + glob('builtins', '__import__') + b'X\x02\x00\x00\x00os\x85R'
        + b'X\x06\x00\x00\x00system\x86R'
        + b'X' + len(command).to_bytes(4, 'little') + command + b'\x85R.'
    )  # fmt: skip
    assert isinstance(read_checkpoint(save_pickle(b'\x80\x02' + pickled)), Inert)
    assert not marker.exists()


def test_torchscript_is_not_run(tmp_path, save):
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(module, tmp_path / 'script.pt')
    assert is_torchscript(tmp_path / 'script.pt') and not is_torchscript(save(dict(a=1)))
    with pytest.raises(
        ValueError, match=r'script\.pt is .* a TorchScript archive .*state_dict\(\)'
    ):
        read_checkpoint(tmp_path / 'script.pt')
