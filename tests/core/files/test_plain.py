"""What a training checkpoint may hold: read by every reader, and written again as plain data, item by item."""

import argparse
import collections
import datetime
import decimal
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict

from mmdenoiserep import fuse_checkpoint
from mmdenoiserep.core import read_checkpoint
from mmdenoiserep.core.files.plain import LEFT_OUT, to_plain
from mmdenoiserep.core.files.stand_ins import InertArray, InertDtype
from mmdenoiserep.engine.resume import allow_training_checkpoints

PALETTE = np.array([[0, 0, 0], [255, 0, 128]], dtype=np.uint8)

VALUES = {
    'namespace': (argparse.Namespace(lr=0.1, betas=(0.9, 0.95)), dict(lr=0.1, betas=(0.9, 0.95))),
    'simple namespace': (types.SimpleNamespace(a=[1]), dict(a=[1])),
    'config dict': (ConfigDict(sensor=dict(name='x', bands=[1, 2])), dict(sensor=dict(name='x', bands=[1, 2]))),
    'palette': (PALETTE, PALETTE.tolist()),
    'fortran': (np.asfortranarray(np.arange(6).reshape(2, 3)), [[0, 1, 2], [3, 4, 5]]),
    'big endian': (np.array([1.5, -2], dtype='>f4'), [1.5, -2]),
    'cube': (np.arange(24).reshape(2, 3, 4), np.arange(24).reshape(2, 3, 4).tolist()),
    'no dimension': (np.array(7), 7),
    'no value': (np.zeros((0, 3)), []),
    'names': (np.array(['cat', 'Hündin']), ['cat', 'Hündin']),
    'names as objects': (np.array(['cat', None], dtype=object), ['cat', None]),
    'matrix': (np.array([[1, 2]]).view(np.matrix), [[1, 2]]),
    'flags': (np.array([True, False]), [True, False]),
    'number': (np.float32(0.25), 0.25),
    'integer': (np.int64(2**40), 2**40),
    'flag': (np.bool_(True), True),
    'text': (np.str_('dog'), 'dog'),
    'keys': ({np.int64(3): 'a', (1, 'b'): 'c', None: 1}, {3: 'a', (1, 'b'): 'c', None: 1}),
    'set': ({'dog', 'cat'}, ['cat', 'dog']),
    'frozen set': (frozenset({2, 1}), [1, 2]),
    'counter': (collections.Counter('aab'), dict(a=2, b=1)),
    'ordered': (collections.OrderedDict(b=1, a=2), dict(b=1, a=2)),
    'default dict': (collections.defaultdict(list, a=[1]), dict(a=[1])),
    'deque': (collections.deque([1, 2], maxlen=3), [1, 2]),
    'path': (pathlib.Path('data/train'), 'data/train'),
    'windows path': (pathlib.PureWindowsPath('c:/data'), 'c:\\data'),
    'date': (datetime.datetime(2024, 5, 6, 7, 8, 9), '2024-05-06 07:08:09'),
    'zone': (datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc), '2024-05-06 00:00:00+00:00'),
    'duration': (datetime.timedelta(hours=2), '2:00:00'),
    'size': (torch.Size([2, 3]), (2, 3)),
    'dtype': (torch.float16, 'torch.float16'),
    'device': (torch.device('cpu'), 'cpu'),
    'bytes': (b'\0\xff', b'\0\xff'),
    'complex': (1 + 2j, 1 + 2j),
}


def denoised_state():
    return {'fc.weight': torch.eye(2), 'fc.bias': torch.ones(2), 'fc.denoiser.weight': torch.full((1, 2, 2), 0.25)}


def fused(tmp_path, content, **options):
    """Saves and fuses a checkpoint; returns the fused one, and the result of the fusion."""
    source, target = tmp_path / 'in.pth', tmp_path / 'out.pth'
    torch.save(dict(state_dict=denoised_state()) | content, source)
    result = fuse_checkpoint(source, target, **options)
    return torch.load(target, weights_only=True), result


@pytest.mark.parametrize('kind', VALUES)
def test_both_readers_take_it_and_the_fused_file_keeps_it(kind, tmp_path, clean_allow_list):
    """One value of each kind: inert for fusing, as it was for training, plain in the fused file's meta."""
    value, expected = VALUES[kind]
    content = dict(meta=dict(dataset_meta=dict(classes=('a', 'b'), it=value)))
    checkpoint, result = fused(tmp_path, content)
    meta = checkpoint['meta']['dataset_meta']
    assert meta == dict(classes=('a', 'b'), it=expected)
    assert type(meta['it']) is type(expected)
    assert result.notes == ()

    assert type(read_checkpoint(tmp_path / 'in.pth')['meta']['dataset_meta']['classes']) is tuple
    allow_training_checkpoints()
    again = torch.load(tmp_path / 'in.pth', weights_only=True)['meta']['dataset_meta']['it']
    if isinstance(value, np.ndarray | np.generic):
        assert np.array_equal(again, value)
    else:
        assert list_of(again) == list_of(value)


def list_of(value):
    """Returns what deque and defaultdict are read as; WindowsPath and ConfigDict compare by value."""
    if isinstance(value, pathlib.PurePath):
        return str(value)
    return list(value) if isinstance(value, collections.deque) else value


def test_trusted_pickles_are_cleaned_too(tmp_path):
    """With --allow-pickle the objects are real ones, and the fused file has the same plain data."""
    meta = {kind: value for kind, (value, _) in VALUES.items()}
    checkpoint, _ = fused(tmp_path, dict(meta=dict(all=meta)), allow_pickle=True)
    assert checkpoint['meta']['all'] == {kind: plain for kind, (_, plain) in VALUES.items()}


@pytest.mark.parametrize('name', ['easydict.EasyDict', 'fvcore.common.config.CfgNode', 'addict.addict.Dict'])
def test_settings_of_other_libraries(name, tmp_path, clean_allow_list, monkeypatch):
    module, _, kind = name.rpartition('.')

    def look_up(self, key):
        if key not in self:
            raise AttributeError(key)
        return self[key]

    cls = type(kind, (dict,), dict(__module__=module, __getattr__=look_up))
    for i in range(1, len(module.split('.')) + 1):
        part = '.'.join(module.split('.')[:i])
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    setattr(sys.modules[module], kind, cls)
    path = tmp_path / 'in.pth'
    torch.save(dict(config=cls(MODEL=cls(DEPTH=2)), meta=dict(cfg_node=cls(a=cls(b=1))), model=denoised_state()), path)
    monkeypatch.undo()
    fuse_checkpoint(path, tmp_path / 'out.pth')
    assert torch.load(tmp_path / 'out.pth', weights_only=True)['meta']['cfg_node'] == dict(a=dict(b=1))
    allow_training_checkpoints()
    for content in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert content['config'] == dict(MODEL=dict(DEPTH=2))


def test_items_are_left_out_one_by_one(tmp_path):
    """What is no plain data is left out by its name; its neighbours stay, and lists are never shortened."""
    odd = torch.eye(2).to_sparse()
    loop = [1]
    loop.append(loop)
    dataset_meta = dict(
        classes=('cat', 'dog'),
        palette=odd,
        keypoints=[dict(name='nose', id=np.int32(0)), dict(name='eye', id=1)],
        skeleton=[dict(link=('nose', 'eye')), odd],
        when=np.datetime64('2024-05-06'),
        deep=dict(one=1, other=dict(odd=odd)),
        loop=loop,
        empty=b'',
    )
    checkpoint, result = fused(tmp_path, dict(meta=dict(epoch=3, dataset_meta=dataset_meta)))
    meta = checkpoint['meta']
    assert meta['epoch'] == 3
    assert meta['dataset_meta'] == dict(
        classes=('cat', 'dog'), keypoints=[dict(name='nose', id=0), dict(name='eye', id=1)], deep=dict(one=1)
    )
    left_out = {f'dataset_meta.{name}' for name in ('palette', 'skeleton', 'when', 'deep.other', 'loop', 'empty')}
    assert set(result.notes[0].partition(': ')[2].split(', ')) == left_out


def test_tensors_in_meta_stay(tmp_path):
    checkpoint, result = fused(tmp_path, dict(meta=dict(class_weight=torch.tensor([1.0, 2.0]))))
    assert result.notes == ()
    assert checkpoint['meta']['class_weight'].tolist() == [1, 2]


def test_shared_lists_do_not_grow(tmp_path):
    """A file of a few bytes that would be 2^40 items, written out, stays small."""
    lists = ['x']
    for _ in range(40):
        lists = [lists, lists]
    fused(tmp_path, dict(meta=dict(lists=lists, odd=decimal.Decimal)), allow_pickle=True)
    assert (tmp_path / 'out.pth').stat().st_size < 10_000


@pytest.mark.parametrize('shape', [(10**12,), (2, 10**9), (-1, -2), (1,) * 5000, ('a',), None])
def test_damaged_arrays_are_left_out(shape, tmp_path):
    """A shape that lies about the data neither fills the memory nor stops the reader."""
    array, left_out = InertArray(), []
    array.__setstate__((1, shape, InertDtype('u1'), False, b'\1\2'))
    assert to_plain(array, 'palette', left_out) is LEFT_OUT
    assert left_out == ['palette']


def test_extra_state_is_kept(tmp_path):

    class Scaled(torch.nn.Linear):
        def get_extra_state(self):
            return dict(calls=3, scale=torch.ones(2), seen={'a'})

        def set_extra_state(self, state):
            self.extra = state

    state = {**denoised_state(), **{f'scaled.{key}': value for key, value in Scaled(2, 2).state_dict().items()}}
    state['odd._extra_state'] = torch.eye(2).to_sparse().to(torch.float64)
    weights = fused(tmp_path, dict(state_dict=state))[0]['state_dict']
    assert torch.equal(weights['fc.weight'], torch.eye(2) - 0.25)
    model = torch.nn.ModuleDict(dict(scaled=Scaled(2, 2)))
    model.load_state_dict({key: value for key, value in weights.items() if key.startswith('scaled.')}, strict=True)
    assert model['scaled'].extra['calls'] == 3 and model['scaled'].extra['scale'].tolist() == [1, 1]
