"""Files are read whatever is in them."""

import pickle
import sys
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from mmtoken.checkpoints import find_weights, read_checkpoint
from mmtoken.checkpoints.restricted_unpickler import Inert


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
