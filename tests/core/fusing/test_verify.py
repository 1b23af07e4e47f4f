"""Tests of the verification: random forwards, and outputs of any kind."""

import collections
import copy
import random
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData
from mmpretrain.models.selfsup import (
    BEiTPretrainViT,
    MAEViT,
    MaskFeatViT,
    MixMIMPretrainTransformer,
    SimMIMSwinTransformer,
)
from torch import nn

from helpers import denoised, random_states, randomise, relative
from mmdenoiserep import apply_denoiserep, fuse_model, verify_fusion
from mmdenoiserep.core import FusionError, compare_models
from mmdenoiserep.core.utils.randomness import equal_draws
from mmdenoiserep.core.utils.tensors import named_tensors, tensors_in

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, between=torch.relu, pack=lambda x: x):
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between
        self.pack = pack

    def forward(self, x):
        return self.pack(self.g(self.between(self.f(x))))


def make(between=torch.relu, pack=lambda x: x):
    torch.manual_seed(0)
    vanilla = Net(between, pack).double().eval()
    model = copy.deepcopy(vanilla)
    apply_denoiserep(model, 'all', rank=3, example_input=X)
    return randomise(model), vanilla


@pytest.mark.parametrize(
    'between',
    [
        lambda x: x * (torch.rand(x.shape) > 0.5),
        lambda x: x * torch.from_numpy(np.random.permutation(8)),
        lambda x: x * random.random(),
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: x + torch.randn_like(x) * np.random.rand() * random.gauss(0, 1),
        lambda x: x[:, torch.multinomial(torch.ones(5), 3)],
    ],
    ids=['mask', 'numpy', 'python', 'dropout', 'all', 'sampled tokens'],
)
def test_random_forward(between):
    """Both models see the same random numbers of every generator, and the program's own stay as they were."""
    model, vanilla = make(between)
    before = random_states()
    result = verify_fusion(model, example_input=X)
    assert result.ok, str(result)
    assert result.differences[0].tolerance == 1e-9
    assert not verify_fusion(model, vanilla, X).ok
    assert random_states() == before


@pytest.mark.parametrize(
    'generator, draw',
    [
        (torch.Generator(), lambda g: torch.rand(8, generator=g)),
        (random.Random(), lambda g: g.random()),
        (np.random.RandomState(), lambda g: torch.from_numpy(g.rand(8))),
        (np.random.default_rng(), lambda g: torch.from_numpy(g.random(8))),
    ],
    ids=['torch', 'python', 'RandomState', 'default_rng'],
)
def test_generators_of_the_models_own(generator, draw):
    """A model that draws from a generator of its own is verified, whatever the two have drawn before."""
    model, vanilla = make()
    fused = fuse_model(model)
    for each in (model, vanilla, fused):
        each.own = copy.deepcopy(generator)
        each.register_forward_pre_hook(lambda module, args: (args[0] * draw(module.own),))
    model(X)
    following = draw(copy.deepcopy(model.own))
    assert verify_fusion(model, fused, X).ok
    assert not verify_fusion(model, vanilla, X).ok
    assert torch.equal(torch.as_tensor(draw(model.own)), torch.as_tensor(following))


VIT = {'embed_dims': 16, 'num_layers': 2, 'num_heads': 2, 'feedforward_channels': 32}
SWIN = {'embed_dims': 16, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 4, 8]}


@pytest.mark.parametrize(
    'backbone, size',
    [
        (lambda: MAEViT(VIT, img_size=32, patch_size=8), 32),
        (lambda: MixMIMPretrainTransformer(SWIN, img_size=64, window_size=[2] * 4, mask_ratio=0.5), 64),
        (lambda: SimMIMSwinTransformer(SWIN, img_size=56, pad_small_map=True), 56),
        (lambda: MaskFeatViT(VIT, img_size=32, patch_size=8, out_type='raw'), 32),
        (lambda: BEiTPretrainViT(VIT, img_size=32, patch_size=8, out_type='raw'), 32),
    ],
    ids=['MAE', 'MixMIM', 'SimMIM', 'MaskFeat', 'BEiT'],
)
def test_masked_image_models(backbone, size):
    """Backbones that hide patches in eval mode too, or require a mask, are verified; a difference is found."""
    torch.manual_seed(0)
    vanilla = backbone()
    vanilla.init_weights()
    for parameter in vanilla.double().parameters():  # some start at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    model = copy.deepcopy(vanilla)
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    assert not apply_denoiserep(model, 'all', rank=2, example_input=x).probe_failure
    fused = fuse_model(randomise(model))
    result = verify_fusion(model, fused, x)
    assert result.ok, str(result)
    assert not verify_fusion(model, vanilla, x).ok


def test_equal_draws():
    """Every generator starts at the seed and is as it was afterwards, also after an error."""
    before = random_states()
    with equal_draws(seed=3):
        first = torch.rand(2).tolist(), np.random.rand(), random.random()
    with pytest.raises(KeyError), equal_draws(seed=3):
        assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == first
        raise KeyError
    with equal_draws(seed=4):
        assert (torch.rand(2).tolist(), np.random.rand(), random.random()) != first
    assert random_states() == before


@dataclass
class Output:
    last: Any
    note: str = 'text'


class Slots:
    __slots__ = ('features', 'missing')

    def __init__(self, features):
        self.features = features


def sample(x):
    instances = InstanceData(scores=x.flatten(1)[:, 0], labels=torch.ones(2, dtype=torch.long))
    return [DetDataSample(pred_instances=instances, metainfo={'img_path': 'a.png'}), PixelData(data=x[:1])]


def attached(x):
    thing = types.SimpleNamespace(parts=[x])
    thing.itself = thing
    return thing


Pair = collections.namedtuple('Pair', 'first second')
PACKINGS = {
    'dataclass': Output,
    'dataclass of lists': lambda x: Output([x, Output(x + 1)]),
    'namedtuple': lambda x: Pair(x, None),
    'dict': lambda x: {'a': x, 2: (x,), ('b', 1): [x]},
    'mapping': lambda x: collections.UserDict(a=x),
    'object': attached,
    'slots': Slots,
    'data elements': sample,
    'distribution': lambda x: torch.distributions.Normal(x, 1, validate_args=False),
    'complex': lambda x: torch.complex(x, x + 1),
    'sparse': lambda x: x.to_sparse(),
    'masked with -inf': lambda x: x.masked_fill(torch.ones(5, 8).triu().bool(), -torch.inf),
    'nested': lambda x: {'outputs': [Pair(Output(x), sample(x))]},
}


@pytest.mark.parametrize('kind', PACKINGS)
def test_outputs_of_any_kind(kind):
    model, vanilla = make(pack=PACKINGS[kind])
    result = verify_fusion(model, example_input=X)
    assert result.differences
    assert result.ok, str(result)
    assert not verify_fusion(model, vanilla, X).ok
    assert list(tensors_in(PACKINGS[kind](X)))


@pytest.mark.parametrize(
    'pack, kind',
    [
        (lambda x: None, 'NoneType'),
        (lambda x: x.tolist(), 'list'),
        (lambda x: Output('text'), 'Output'),
        (lambda x: x.argmax(-1), 'Tensor'),
        (lambda x: {}, 'dict'),
    ],
)
def test_outputs_without_numbers(pack, kind):
    model, _ = make(pack=pack)
    with pytest.raises(FusionError, match=f'no floating-point tensor.* a {kind}'):
        verify_fusion(model, example_input=X)


def test_a_model_without_denoisers():
    model, vanilla = make()
    with pytest.raises(FusionError, match='no denoiser'):
        verify_fusion(vanilla, vanilla, X)
    assert verify_fusion(model, example_input=X).ok


def test_places():
    """Each tensor has the name of its place, and one in a cycle is found once."""
    value = {'a': [X, Output(X)], 2: Pair(X, Slots(X))}
    value['self'] = value
    names = [name for name, _ in named_tensors(value, 'out')]
    assert names == ["out['a'][0]", "out['a'][1].last", 'out[2][0]', 'out[2][1].features']
    assert [name for name, _ in named_tensors(sample(X))][0] == 'output[0]._pred_instances.scores'


def test_mixed_dtypes():
    """The tolerance is that of the layers with denoisers, whatever the first parameter of the model is."""
    model, _ = make()
    model.float()
    model.register_parameter('scale', nn.Parameter(torch.ones(1, dtype=torch.float64)))
    result = verify_fusion(model, example_input=X.float())
    assert result.ok
    assert result.differences[0].tolerance == 1e-4
    assert relative(fuse_model(model)(X.float()), model(X.float())) < 1e-4


def test_two_plain_models():
    """Any two models are compared, in eval mode and with the same random numbers; the tolerance is the model's own."""
    model, vanilla = make(lambda x: x * (torch.rand(x.shape) > 0.5))
    fused, before = fuse_model(model).train(), random_states()
    result = compare_models(fused, copy.deepcopy(fused), X)
    assert result.ok and result.differences[0].max_abs == 0 and result.differences[0].tolerance == 1e-9
    assert not compare_models(fused, vanilla, X).ok
    assert compare_models(fused, vanilla, X, tolerance=1e9).ok
    assert random_states() == before and fused.training
    with pytest.raises(FusionError, match='different outputs'):
        compare_models(fused, nn.GRU(8, 8).double(), X)


def test_what_is_wrong_is_found():
    layer, x = denoised(nn.Linear(8, 4)), X.float()
    good = fuse_model(layer)
    verification = verify_fusion(layer, good, x)
    assert verification.ok
    assert verification.differences[0].output == 'output'
    assert {'largest', 'relative', 'tolerance', 'ok'} <= set(str(verification).split())
    for value in (torch.nan, torch.inf, good.weight[0, 0].item() + 0.1):
        bad = copy.deepcopy(good)
        bad.weight.data[0, 0] = value
        result = verify_fusion(layer, bad, x)
        assert not result.ok
        assert 'TOO LARGE' in str(result)
    assert not verify_fusion(layer, good, x, tolerance=-1.0).ok
    with pytest.raises(ValueError, match='shape'):
        verify_fusion(layer, nn.Linear(8, 5), x)
    with pytest.raises(ValueError, match='different outputs'):
        verify_fusion(layer, nn.GRU(8, 4), x)
