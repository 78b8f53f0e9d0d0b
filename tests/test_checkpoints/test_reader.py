"""Files are read whatever is in them, and nothing in them is run."""

import os
import pickle
import sys
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from mmtoken.checkpoints import find_weights, read_checkpoint
from mmtoken.checkpoints.restricted_unpickler import KNOWN_NAMES, Inert, is_torchscript

FORMATS = [{}, dict(_use_new_zipfile_serialization=False)]


@pytest.fixture(params=FORMATS, ids=['zip', 'legacy'])
def kind(request):
    return request.param


def assert_equal(state, expected):
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


@pytest.fixture
def weights():
    joint = torch.randn(6, 4)
    return dict(
        plain=torch.randn(2, 3),
        view=joint[2:4],
        shares=joint[3:5],
        transposed=torch.randn(3, 5).t(),
        expanded=torch.ones(1).expand(3, 4),
        empty=torch.zeros(0, 3),
        half=torch.randn(4).half(),
        brain=torch.randn(4).bfloat16(),
        count=torch.tensor(7),
        mask=torch.tensor([True, False]),
    )


def test_every_kind_of_tensor(weights, kind, save):
    state = find_weights(read_checkpoint(save(weights, **kind)), 'file')
    assert_equal(state, weights)
    assert not any(tensor.requires_grad for tensor in state.values())


def test_modules_and_parameters(kind, save):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    parameters = dict(module.named_parameters())
    assert_equal(read_checkpoint(save(module.state_dict(), **kind)), module.state_dict())
    found = find_weights(read_checkpoint(save(parameters, **kind)), 'file')
    assert not any(t.requires_grad or isinstance(t, torch.nn.Parameter) for t in found.values())
    assert_equal(found, {name: p.detach() for name, p in parameters.items()})


def test_safetensors(weights, tmp_path):
    contiguous = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    save_file(contiguous, tmp_path / 'model.bin')
    found = read_checkpoint(tmp_path / 'model.bin')
    assert_equal(dict(sorted(found.items())), dict(sorted(contiguous.items())))


def test_objects_of_missing_packages(training_leftovers, kind, save):
    with training_leftovers() as leftovers:
        file = save(dict(leftovers, model=dict(weight=torch.ones(2))), **kind)
    found = read_checkpoint(file)
    assert 'oldconf' not in sys.modules
    assert found['epoch'] == 12 and torch.equal(found['model']['weight'], torch.ones(2))
    assert type(found['args']).__name__ == 'argparse.Namespace'
    for name in ('args', 'config'):
        assert isinstance(found[name], Inert) and not vars(found[name])


@pytest.mark.parametrize('wrapper', ['state_dict', 'model', 'model_ema'])
def test_weights_are_unwrapped(wrapper, save):
    content = {wrapper: dict(weight=torch.ones(2), epoch=3), 'other': dict(weight=torch.zeros(2))}
    assert_equal(find_weights(read_checkpoint(save(content)), 'file'), dict(weight=torch.ones(2)))


# What hostile files do


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
    assert_equal(find_weights(found, 'file'), dict(weight=torch.ones(2)))
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


def test_length_beyond_the_record(save, tmp_path):
    """The pickle says 4096 numbers, the record has 4."""
    file = save(dict(weight=torch.arange(4.0)), '4.pth')
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / '4096.pth', 'w') as new:
        for record in old.namelist():
            content = old.read(record)
            if record.endswith('/data.pkl'):
                longer = content.replace(b'cpuq\x06K\x04t', b'cpuq\x06M\x00\x10t')
                longer = longer.replace(b'K\x00K\x04\x85', b'K\x00M\x00\x10\x85')
                assert len(longer) == len(content) + 2
                content = longer
            new.writestr(record, content)
    with pytest.raises(ValueError, match='4096.pth is damaged'):
        read_checkpoint(tmp_path / '4096.pth')


def test_torchscript_is_not_run(tmp_path, save):
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(module, tmp_path / 'script.pt')
    assert is_torchscript(tmp_path / 'script.pt') and not is_torchscript(save(dict(a=1)))
    with pytest.raises(
        ValueError, match=r'script\.pt is .* a TorchScript archive .*state_dict\(\)'
    ):
        read_checkpoint(tmp_path / 'script.pt')


def test_tar_is_not_extracted(tmp_path):
    """A tar archive can also begin like a pickle: its first bytes are a name."""
    ustar = dict(format=tarfile.USTAR_FORMAT, encoding='latin-1')
    with tarfile.open(tmp_path / 'file.pth', 'w', **ustar) as archive:
        for name in ('\x80\x02.', 'storages'):
            archive.addfile(tarfile.TarInfo(name))
    assert (tmp_path / 'file.pth').read_bytes().startswith(b'\x80\x02.')
    with pytest.raises(ValueError, match='tar archive; unpack it'):
        read_checkpoint(tmp_path / 'file.pth')


# What is no checkpoint


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', "b''"),
        (b'<!DOCTYPE html><html>404</html>', "b'<!DOCTYPE html>"),
        (b'version https://git-lfs.github.com/spec/v1\noid', "b'version https://git-lfs"),
        (b'epoch,loss\n1,2', "b'epoch,loss"),
        (pickle.dumps(dict(weight=1)), r"b'\\x80"),
        (b'PK\x03\x04' + b'x' * 50, r"b'PK\\x03"),
    ],
)
def test_other_files_are_shown(content, message, tmp_path):
    (tmp_path / 'file.pth').write_bytes(content)
    message = rf'file.pth is damaged or no checkpoint: .* \(it begins with {message}'
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / 'file.pth')


def test_other_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.writestr('a/b.txt', 'text')
    with pytest.raises(ValueError, match='a.zip is damaged or no checkpoint'):
        read_checkpoint(tmp_path / 'a.zip')


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize('part', [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(part, kind, save, tmp_path):
    file = save(dict(weight=torch.randn(64, 64), bias=torch.randn(64)), **kind)
    with open(file, 'rb') as stream:
        whole = stream.read()
    (tmp_path / 'part.pth').write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match='part.pth is damaged or no checkpoint: .'):
        read_checkpoint(tmp_path / 'part.pth')


@pytest.mark.parametrize('seed', range(20))
def test_damaged_files_raise_nothing_else(seed, kind, save, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    with open(save(dict(weight=torch.randn(8, 8)), **kind), 'rb') as stream:
        damaged = bytearray(stream.read())
    for i in torch.randint(len(damaged), (4,), generator=generator):
        damaged[i] = int(torch.randint(256, (), generator=generator))
    (tmp_path / 'damaged.pth').write_bytes(damaged)
    try:
        find_weights(read_checkpoint(tmp_path / 'damaged.pth'), 'damaged.pth')
    except ValueError as error:
        assert 'damaged.pth' in str(error)


@pytest.mark.parametrize(
    'content, message',
    [
        ([1, 2], 'holds no weights.* but a list'),
        (dict(epoch=3, args=[1]), "but a mapping with the keys 'epoch', 'args'"),
        ({i: i for i in range(20)}, 'and 12 more'),
        (torch.nn.Linear(2, 2), r'state_dict\(\) gives them, but a torch.nn.modules.linear.Linear'),
    ],
)
def test_no_weights(content, message, save):
    file = save(content)
    with pytest.raises(ValueError, match=message):
        find_weights(read_checkpoint(file), file)
