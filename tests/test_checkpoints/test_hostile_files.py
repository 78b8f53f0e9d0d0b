"""Files that nobody should give to a backbone: one error that names the file, and nothing is run.

How a reader alone meets such files is in ``test_reader.py``.
"""

import resource
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SHORT_VIT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmtoken.registry import MODELS

ARGS = dict(type='mmtoken.MergeViT', arch=dict(SHORT_VIT, num_layers=2), merge_blocks=1)
A_WEIGHT = 'blocks.0.attn.qkv.weight'


def build(file=None, cfg=ARGS):
    init_cfg = None if file is None else dict(type='Pretrained', checkpoint=str(file))
    torch.manual_seed(0)
    return MODELS.build(dict(cfg, init_cfg=init_cfg))


def load(file, cfg=ARGS):
    model = build(file, cfg)
    model.init_weights()
    return model.state_dict()


def refuse(file, message, cfg=ARGS):
    """One line that names the file; the model has nothing of it."""
    model = build(file, cfg)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        model.init_weights()
    assert Path(file).name in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.fixture(scope='module')
def weights():
    torch.manual_seed(1)
    return {name: torch.randn_like(tensor) for name, tensor in build().state_dict().items()}


@pytest.fixture(scope='module')
def contents(weights):
    """The bytes of a checkpoint, in each format."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ('zip', 'legacy', 'safetensors')]
        torch.save(weights, files[0])
        torch.save(weights, files[1], _use_new_zipfile_serialization=False)
        save_file(weights, files[2])
        return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
@settings(deadline=None, max_examples=30)
@given(part=st.floats(0, 0.9999))
def test_truncated_anywhere(kind, part, contents):
    whole = contents[kind]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'part.pth')
        file.write_bytes(whole[: int(part * len(whole))])
        refuse(file, 'part.pth is damaged or no checkpoint: ')


def load_flipped(content, place, bit):
    """What a file with one wrong bit gives; None if it is refused by its name."""
    damaged = bytearray(content)
    damaged[int(place * len(damaged))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'damaged.pth')
        file.write_bytes(damaged)
        try:
            return load(file)
        except ValueError as error:
            assert 'damaged.pth' in str(error)
            return None


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere(place, bit, contents, weights):
    """Either it is refused, or it is none of the content."""
    loaded = load_flipped(contents['zip'], place, bit)
    if loaded is not None:
        torch.testing.assert_close(loaded, weights, rtol=0, atol=0)


@pytest.mark.parametrize('kind', ['legacy', 'safetensors'])
@settings(deadline=None, max_examples=30)
@given(place=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_a_flipped_bit_without_checksums(kind, place, bit, contents):
    """These formats have none: values may differ, but are numbers."""
    loaded = load_flipped(contents[kind], place, bit)
    if loaded is not None:
        assert all(tensor.isfinite().all() for tensor in loaded.values())


@pytest.mark.parametrize('name', FAMILIES)
def test_weights_of_another_family(name, save):
    other = 'SWATSwin' if name != 'SWATSwin' else 'PSViT'
    source = MODELS.build(dict(type=f'mmtoken.{other}', **FAMILIES[other].small))
    refuse(
        save(source.state_dict(), 'other.pth'), f'other.pth: does not fit {name}; ',
        dict(type=f'mmtoken.{name}', **FAMILIES[name].small),
    )  # fmt: skip


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(dtype, save, weights):
    loaded = load(save({name: tensor.to(dtype) for name, tensor in weights.items()}))
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    torch.testing.assert_close(loaded, weights, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_types_that_are_no_weights(dtype, save, weights):
    file = save(dict(weights, **{A_WEIGHT: weights[A_WEIGHT].to(dtype)}))
    refuse(file, f'1 tensors are {dtype}: {A_WEIGHT}')


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers(value, save, weights):
    broken = weights[A_WEIGHT].clone()
    broken[3, 5] = value
    refuse(save(dict(weights, **{A_WEIGHT: broken})), f'NaN or infinity in 1 .*: {A_WEIGHT}')


@pytest.mark.parametrize('kind', ['meta', 'sparse'])
def test_tensors_without_values(kind, save, weights):
    tensor = weights[A_WEIGHT].to_sparse() if kind == 'sparse' else weights[A_WEIGHT].to('meta')
    refuse(save(dict(weights, **{A_WEIGHT: tensor})), f'sparse, quantized or on .*: {A_WEIGHT};')


@pytest.mark.parametrize('record', ['data.pkl', 'data/0'])
def test_a_bomb_is_not_unpacked(record, save, weights, tmp_path):
    """A file of half a megabyte that has a quarter of a gigabyte of zeros."""
    bomb = tmp_path / 'bomb.pth'
    with (
        zipfile.ZipFile(save(weights)) as old,
        zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            with new.open(name, 'w') as stream:
                stream.write(old.read(name))
                if name.endswith(f'/{record}'):
                    for _ in range(2**8):
                        stream.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB
    refuse(bomb, 'bomb.pth is damaged or no checkpoint: it would unpack to 2')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17


@pytest.mark.parametrize('place', ['beside', 'inside'])
def test_code_is_never_run(place, save, weights, tmp_path):
    class Code:
        def __reduce__(self):
            return exec, (f'open({str(tmp_path / "ran")!r}, "w")',)

    if place == 'beside':
        load(save(dict(state_dict=weights, other=Code())))
    else:
        refuse(save(dict(weights, **{A_WEIGHT: Code()})), f'lacks: {A_WEIGHT}')
    assert not (tmp_path / 'ran').exists()


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / 'page.pth').write_text('<!DOCTYPE html><html>Sign in</html>')
    refuse(tmp_path / 'page.pth', 'page.pth is damaged or no checkpoint: .*DOCTYPE')
    (tmp_path / 'empty.pth').touch()
    refuse(tmp_path / 'empty.pth', 'empty.pth is damaged or no checkpoint: ')
    (tmp_path / 'folder.pth').mkdir()
    refuse(tmp_path / 'folder.pth', 'folder.pth')
    refuse(tmp_path / 'none.pth', 'none.pth')
