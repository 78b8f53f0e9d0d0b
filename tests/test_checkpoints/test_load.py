import pytest
import torch
import torchvision
from torch import nn

from mmtoken.backbones import STViTRSwin
from mmtoken.checkpoints import Report, convert, detect_source, load_into


class Net(nn.Linear):
    ignorable_keys = r'head\..*'
    newly_initialized_keys = r'bias'


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('start', ['', 'module.', 'backbone.', 'module.backbone.'])
def test_layouts(wrapper, start, save):
    weight = torch.randn(2, 3)
    content = {f'{start}weight': weight, f'{start}head.bias': torch.zeros(1)}
    net = Net(3, 2)
    bias = net.bias.clone()
    report = load_into(net, save({wrapper: content} if wrapper else content))
    assert torch.equal(net.weight, weight) and torch.equal(net.bias, bias)
    expected = dict(dropped=report.dropped, newly_initialized=['bias'])
    assert report == Report(mapped=dict(weight='weight'), **expected)
    assert [name.removeprefix('backbone.') for name in report.dropped] == ['head.bias']


@pytest.mark.parametrize(
    'content, message',
    [
        ([1, 2], 'holds no weights'),
        (dict(epoch=3), 'holds no weights'),
        (dict(bias=torch.zeros(2)), 'names it lacks: weight'),
        (dict(weight=torch.zeros(2, 3), gate=torch.zeros(1)), 'should not have: gate'),
        (dict(weight=torch.zeros(3, 3)), r'weight \(3, 3\) instead of \(2, 3\)'),
    ],
)
def test_what_does_not_fit_is_refused(content, message, save):
    net = Net(3, 2)
    before = net.weight.clone()
    with pytest.raises(ValueError, match=f'file.pth.*{message}'):
        load_into(net, save(content))
    assert torch.equal(net.weight, before)


def test_wrong_prefix_is_named(save):
    file = save({'encoder.weight': torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"file.pth: .*prefix 'backbone\.'.* encoder$"):
        load_into(Net(3, 2), file, prefix='backbone')
    assert load_into(Net(3, 2), file, prefix='encoder').mapped == dict(weight='weight')


def test_all_that_differs_is_listed_at_once(save):
    file = save(dict(gate=torch.zeros(1), bias=torch.zeros(3)))
    with pytest.raises(ValueError) as caught:
        load_into(Net(3, 2), file)
    for part in ('not have: gate', 'lacks: weight', 'bias (3,) instead of (2,)', '1 of its 2'):
        assert part in str(caught.value)


def test_unknown_family(save):
    resnet = torchvision.models.resnet18(weights=None).state_dict()
    assert detect_source(resnet) is None
    known = 'stvit-r, swat, swin, vtpack, pvt, rotary-vit, dinov2, deit, vit'
    message = rf'does not fit STViTRSwin; its names are of no known source \({known}\)'
    with pytest.raises(ValueError, match=f'file.pth: {message} and has 0 of its'):
        load_into(STViTRSwin('tiny'), save(resnet))


def test_unknown_source(save):
    known = r"\['deit', 'dinov2', 'pvt', 'rotary-vit', 'stvit-r'"
    with pytest.raises(ValueError, match=f"file.pth: source is 'swim'; known are {known}"):
        load_into(Net(3, 2), save(dict(weight=torch.zeros(2, 3))), source='swim')


@pytest.mark.parametrize(
    'state, message',
    [
        (
            {'a.weight': 0, 'b.weight': 1},
            'of no known source; names .* a, b',
        ),
        (
            {'blocks.0.attn.qkv.weight': 0, 'patch_embed.proj.weight': 0},
            r"'swin' checkpoint \(OpenMMLab, Microsoft, timm\), they look like 'vit'",
        ),
    ],
)
def test_source_that_it_is_not(state, message, save):
    state = {name: torch.zeros(1) for name in state}
    with pytest.raises(ValueError, match=message):
        convert(state, 'swin')
    with pytest.raises(ValueError, match=f'file.pth: .*{message}'):
        load_into(Net(3, 2), save(state), source='swin')


def test_half_precision_files(save):
    net, weight = Net(3, 2), torch.randn(2, 3).half()
    load_into(net, save(dict(weight=weight)))
    assert net.weight.dtype == torch.float32 and torch.equal(net.weight, weight.float())


def test_own_names_are_taken_as_they_are(save):
    """A semantic backbone's own file has no need of a source, and nothing in it may be missing."""
    arch = dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 2, 4))
    theirs = STViTRSwin(arch, use_global=True, conv_pos=True).state_dict()
    ours = STViTRSwin(arch, use_global=True, conv_pos=True)
    report = load_into(ours, save(dict(state_dict={f'backbone.{k}': v for k, v in theirs.items()})))
    assert report.source is None and report.newly_initialized == report.dropped == []
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_log(save, monkeypatch):
    lines = []
    monkeypatch.setattr(
        'mmtoken.checkpoints.load.print_log', lambda message, logger: lines.append(message)
    )
    load_into(Net(3, 2), save({'weight': torch.zeros(2, 3), 'head.bias': torch.zeros(1)}))
    (line,) = lines
    assert line.endswith(
        "the module's own names: 1 tensors; 1 dropped (head.bias); 1 newly initialized (bias)"
    )


@pytest.mark.parametrize(
    'name, library',
    [
        ('features.1.0.attn.qkv.weight', 'torchvision'),
        ('swin.encoder.layers.0.blocks.0.attention.self.query.weight', 'Hugging Face'),
        ('embeddings.cls_token', 'Hugging Face'),
    ],
)
def test_libraries_whose_names_are_not_known(name, library, save):
    with pytest.raises(ValueError, match=f"look like {library}.*'s; take the file of timm"):
        load_into(nn.Linear(1, 1), save({name: torch.zeros(1)}))
