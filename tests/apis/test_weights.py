"""LoadingCheck: which checkpoints are refused for a start, a resumed run and a test, and what a model lacks."""

import copy

import pytest
import torch
from mmengine.model import BaseTTAModel
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from helpers import randomise
from mmdenoiserep import apply_denoiserep
from mmdenoiserep.apis.weights import LoadingCheck
from mmdenoiserep.core import InputError

PURPOSES = ('start', 'resume', 'test', 'features')
BY_CHANCE = {'head.1.bias': torch.zeros(4)}


class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, classes))


def trained(classes=4):
    torch.manual_seed(0)
    net = Net(classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.state_dict()


def load(model, content, purpose):
    """Loads as the tools do: mmengine's function between what watches it."""
    loading = LoadingCheck(model, 'in.pth', purpose)
    content = copy.copy(content)
    loading.unwrap(content)
    loading.check_content(content)
    _load_checkpoint_to_model(model, content, logger='silent')
    loading.check_model()
    return model


def without(state, *parts):
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


@pytest.mark.parametrize('purpose', PURPOSES)
@pytest.mark.parametrize('wrap', [None, 'state_dict', 'model', 'ema'])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_weights_are_found(purpose, wrap, prefix):
    state = trained()
    content = {prefix + key: value for key, value in state.items()}
    content = content if wrap is None else {wrap: content, 'epoch': 3, 'args': dict(lr=0.1)}
    model = load(Net(), content, purpose)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('purpose', PURPOSES)
@pytest.mark.parametrize(
    'rename',
    [
        lambda key: key.replace('backbone', 'encoder').replace('head', 'classifier'),
        lambda key: f'net._orig_mod.{key}',
        lambda key: key.replace('.', '/'),
    ],
)
def test_no_name_fits(purpose, rename):
    state = trained()
    with pytest.raises(InputError) as caught:
        load(Net(), dict(state_dict={rename(key): value for key, value in state.items()}), purpose)
    assert rename('backbone.0.weight') in str(caught.value) and 'needs backbone.0.weight' in str(caught.value)
    assert 'in.pth' in str(caught.value) and '0 of 12 parameters' in str(caught.value)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (dict(state_dict={}), 'in.pth has no'),
        (dict(state_dict=[1]), 'in.pth has no'),
        (dict(state_dict=None), 'in.pth has no'),
        (dict(epoch=3), 'in.pth has no'),
        ({f'blocks.{i}.weight': torch.zeros(1) for i in range(40)} | BY_CHANCE, 'it has 1 of 12 parameters'),
    ],
    ids=['empty', 'list', 'none', 'no state', 'one name by chance'],
)
@pytest.mark.parametrize('purpose', PURPOSES)
def test_no_weights_and_hardly_any(content, words, purpose):
    with pytest.raises(InputError, match=words):
        load(Net(), content, purpose)


@pytest.mark.parametrize('classes', [4, 9])
def test_a_training_may_start_from_a_part(classes):
    state = trained()
    for part in (without(state, 'head'), state):
        model = load(Net(classes), dict(state_dict=part), 'start')
        assert torch.equal(model.backbone[2].weight, state['backbone.2.weight'])
        assert torch.equal(model.backbone[3].running_var, state['backbone.3.running_var'])


def test_a_small_backbone_of_a_large_model_is_a_start():
    large, state = Net(), without(trained(), 'head')
    large.decoder = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    model = load(large, dict(state_dict=state), 'start')
    assert torch.equal(model.backbone[0].weight, state['backbone.0.weight'])
    with pytest.raises(InputError, match='8 of 212 parameters'):
        load(large, dict(state_dict=state), 'test')


@pytest.mark.parametrize('purpose', ['resume', 'test'])
def test_other_number_of_classes(purpose):
    """mmengine leaves such a head as it was initialised, with a warning; the results would be noise."""
    with pytest.raises(InputError, match=r'head.1.weight is \(9, 8\) in the file and \(4, 8\) in the model'):
        load(Net(), dict(state_dict=trained(9)), purpose)
    load(Net(), dict(state_dict=trained(9)), 'features')


@pytest.mark.parametrize('lost', [('running',), ('running', 'tracked'), ('running_var',), ('backbone.3.running_mean',)])
def test_missing_statistics(lost, caplog, capsys):
    content = dict(state_dict=without(trained(), *lost))
    for purpose in ('test', 'features'):
        with pytest.raises(InputError, match='statistics of .* BatchNorm layers .*backbone.*running'):
            load(Net(), content, purpose)
    load(Net(), content, 'start')
    load(Net(), dict(state_dict=without(trained(), 'tracked')), 'test')


@pytest.mark.parametrize('lost', [('1.running_mean', '1.running_var'), ('1.',)])
def test_missing_statistics_of_frozen_layers(lost):
    """torchvision's FrozenBatchNorm2d has buffers alone; a file without them would leave it the identity."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    for state in (without(net.state_dict(), *lost), dict(net.named_parameters())):
        for purpose in ('test', 'features'):
            with pytest.raises(InputError, match=r'1\.running_mean'):
                load(net, dict(state_dict=state), purpose)
    load(net, dict(state_dict=net.state_dict()), 'test')


@pytest.mark.parametrize('purpose', PURPOSES)
def test_new_batchnorm_of_a_new_head_is_none_of_the_files(purpose):
    net = Net()
    net.neck = nn.BatchNorm1d(8)
    load(net, dict(state_dict=trained()), purpose)


class Resizing(Net):
    """Loads a table of another length, as position embeddings are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(5))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[f'{prefix}table'] = state_dict[f'{prefix}table'][:5]
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_model_that_changes_shapes_while_it_loads():
    model = load(Resizing(), dict(state_dict=trained() | dict(table=torch.arange(9.0))), 'test')
    assert model.table.tolist() == [0, 1, 2, 3, 4]


def test_wrapped_models():
    net = Net()
    net.test_step = None
    wrapper = type('Averaging', (BaseTTAModel,), dict(merge_preds=None))(net)
    model = load(wrapper, dict(state_dict=trained()), 'test')
    assert torch.equal(model.module.head[0].weight, trained()['head.0.weight'])


def test_lora():
    """The state dict of a model with LoRA holds the weights of LoRA alone, which are all that is expected."""

    class Lora(Net):
        def __init__(self):
            super().__init__()
            self.lora_a = nn.Parameter(torch.zeros(3))
            self._register_state_dict_hook(self.only_lora)

        @staticmethod
        def only_lora(module, state, prefix, metadata):
            for key in [key for key in state if 'lora' not in key]:
                del state[key]

    model = load(Lora(), dict(state_dict=dict(lora_a=torch.ones(3))), 'test')
    assert model.lora_a.tolist() == [1, 1, 1]


def denoised(targets='all', rank=None):
    net = Net()
    apply_denoiserep(net.backbone, targets, rank=rank, example_input=torch.zeros(1, 3, 9, 9))
    return randomise(net)


def test_denoisers_on_one_side():
    """Denoisers of a file are never dropped; a vanilla file is taken by a denoised model, a fused one to start only."""
    state = denoised().state_dict()
    for purpose in PURPOSES:
        with pytest.raises(InputError, match='has denoisers and the config has none'):
            load(Net(), dict(state_dict=state), purpose)
        with pytest.raises(InputError, match='that the config does not make .backbone.2.denoiser'):
            load(denoised('0'), dict(state_dict=state), purpose)
        assert load(denoised(), dict(state_dict=state), purpose).state_dict().keys() == state.keys()
        load(denoised(), dict(state_dict=trained()), purpose)
        for rank, other in ((2, 3), (2, None), (None, 2)):
            with pytest.raises(InputError, match='denoiser'):
                load(denoised(rank=rank), dict(state_dict=denoised(rank=other).state_dict()), purpose)
        load(denoised(rank=2), dict(state_dict=denoised(rank=2).state_dict()), purpose)
    fused = dict(state_dict=trained(), meta=dict(denoiserep=dict(fused=True)))
    load(denoised(), fused, 'start')
    for purpose in ('test', 'features'):
        with pytest.raises(InputError, match='is fused'):
            load(denoised(), fused, purpose)


def test_a_module_of_the_user_called_denoiser():
    net, other = Net(), Net()
    for each in (net, other):
        each.head.add_module('denoiser', nn.Linear(2, 2))
    weight = net.head.denoiser.weight
    assert torch.equal(load(other, dict(state_dict=net.state_dict()), 'test').head.denoiser.weight, weight)


class Semi(nn.Module):
    """Gives the weights of a detector to both of its own, as mmdet's semi-supervised models do."""

    def __init__(self, make):
        super().__init__()
        self.student, self.teacher = make(), make()

    def _load_from_state_dict(self, state_dict, *args):
        for key in list(state_dict):
            state_dict[f'student.{key}'] = state_dict[f'teacher.{key}'] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, *args)


def test_a_detector_for_a_semi_supervised_model():
    for make in (Net, denoised):
        state = make().state_dict()
        model = load(Semi(make), dict(state_dict=state), 'start')
        assert all(torch.equal(value, state[key]) for key, value in model.teacher.state_dict().items())
    with pytest.raises(InputError, match='has denoisers and the config has none'):
        load(Semi(Net), dict(state_dict=denoised().state_dict()), 'start')
