"""Files that are no checkpoint of torch.save are named for what they are; safetensors files and wrappers are read."""

import argparse
import gzip
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from helpers import write_safetensors
from mmdenoiserep import fuse_checkpoint
from mmdenoiserep.core import CheckpointError, read_checkpoint
from mmdenoiserep.core.files.content import open_checkpoint


def denoised_state():
    return {'fc.weight': torch.eye(2), 'fc.bias': torch.ones(2), 'fc.denoiser.weight': torch.full((1, 2, 2), 0.25)}


@pytest.mark.parametrize('padding', [0, 1, 7])
def test_safetensors(padding, tmp_path):
    """Every dtype and shape comes back bit by bit, whatever the alignment; the file fuses."""
    state = {
        **denoised_state(),
        'half': torch.randn(3, 5).bfloat16(),
        'wide': torch.randn(2, 1, 3, dtype=torch.float64),
        'count': torch.tensor(7),
        'mask': torch.tensor([True, False, True]),
        'none': torch.zeros(0, 4),
    }
    path = write_safetensors(tmp_path / 'model.safetensors', state, dict(format='pt'), padding)
    again = read_checkpoint(path)['state_dict']
    assert list(again) == list(state)
    assert all(torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in state.items())
    fuse_checkpoint(path, tmp_path / 'out.pth')
    fused = torch.load(tmp_path / 'out.pth')['state_dict']
    assert torch.equal(fused['fc.weight'], torch.eye(2) - 0.25)


@pytest.mark.parametrize(
    'entry',
    [
        dict(dtype='F32', shape=[2], data_offsets=[0, 10**15]),
        dict(dtype='F32', shape=[3], data_offsets=[0, 8]),
        dict(dtype='F32', shape=[2], data_offsets=[8, 0]),
        dict(dtype='F32', shape=[2]),
        dict(dtype='F4', shape=[2], data_offsets=[0, 8]),
        ['F32'],
    ],
)
def test_damaged_safetensors(entry, tmp_path):
    text = json.dumps(dict(w=entry)).encode()
    path = tmp_path / 'model.safetensors'
    path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(8))
    with pytest.raises(CheckpointError, match='damaged safetensors|dtype F4'):
        read_checkpoint(path)


def jit(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def onnx_model(path):
    onnx = pytest.importorskip('onnx')
    graph = onnx.helper.make_graph([], 'g', [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name='pytorch'), path)


def tar(path):
    (path.parent / 'inside.pth').write_bytes(b'x')
    with tarfile.open(path, 'w') as archive:
        archive.add(path.parent / 'inside.pth', 'inside.pth')


def zipped(path):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('release/epoch_12.pth', b'x')


FILES = {
    "a text file, which begins with 'import torch'": b'\nimport torch\nmodel = dict()\n',
    'a text file.*net name': b'<net name="resnet" version="11"/>',
    'a text file.*Entry not found': b'Entry not found',
    'a picture': b'\x89PNG\r\n\x1a\n' + bytes(30),
    'a 7z archive': b'7z\xbc\xaf\x27\x1c' + bytes(30),
    'git-lfs': b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n',
    'web page': b'\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>',
    'HDF5': b'\x89HDF\r\n\x1a\n' + bytes(100),
    'GGUF': b'GGUF\3\0\0\0' + bytes(100),
    'empty': b'',
    'parts': json.dumps(dict(weight_map={'a': 'model-1-of-2.bin', 'b': 'model-2-of-2.bin'})).encode(),
    'JSON': b'{"architectures": ["ViT"]}\n',
    'gzip': gzip.compress(pickle.dumps(1)),
    'plain pickle': pickle.dumps(dict(model={'a': np.zeros(2)})),
    'TorchScript': jit,
    'ONNX': onnx_model,
    'tar archive': tar,
    'unpack it, and take release/epoch_12.pth': zipped,
    'archive of numpy': lambda path: np.savez(path.open('wb'), a=np.zeros(2)),
    'array of numpy': lambda path: np.save(path.open('wb'), np.zeros(2)),
}


@pytest.mark.parametrize('kind', FILES)
def test_what_the_file_is(kind, tmp_path):
    """The sentence says what it is, and not that it should be downloaded again."""
    path, make = tmp_path / 'weights.pth', FILES[kind]
    path.write_bytes(make) if isinstance(make, bytes) else make(path)
    with pytest.raises(CheckpointError, match=kind) as caught:
        read_checkpoint(path)
    assert 'truncated' not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_pickle_protocol(protocol, tmp_path):
    path = tmp_path / 'in.pth'
    torch.save(dict(state_dict=denoised_state(), meta=dict(a=frozenset('ab'))), path, pickle_protocol=protocol)
    if protocol > 3:
        with pytest.raises(CheckpointError, match=f'protocol {protocol}.*--allow-pickle'):
            read_checkpoint(path)
    assert torch.equal(read_checkpoint(path, allow_pickle=True)['state_dict']['fc.weight'], torch.eye(2))


def test_whole_model(tmp_path):
    """A model that was saved as an object is refused with what to do instead; inside a dict its weights are taken."""
    path = tmp_path / 'in.pth'
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r'running code that it brings \(torch.nn.modules.linear.Linear\)'):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match=r'state_dict\(\) instead'):
        read_checkpoint(path, allow_pickle=True)
    torch.save(dict(model=nn.Linear(2, 2), epoch=3), path)
    assert list(open_checkpoint(path, allow_pickle=True).weights) == ['weight', 'bias']


@pytest.mark.parametrize('key', ['model', 'teacher', 'state_dict_ema', 'net'])
def test_one_wrapper(key, tmp_path):
    path = tmp_path / 'in.pth'
    others = dict(epoch=3, args=argparse.Namespace(lr=0.1), optimizer=dict(state={0: dict(step=1)}, param_groups=[{}]))
    torch.save({key: denoised_state(), **others}, path)
    result = fuse_checkpoint(path, tmp_path / 'out.pth')
    assert any(key in note for note in result.notes)
    assert torch.equal(torch.load(tmp_path / 'out.pth')['state_dict']['fc.weight'], torch.eye(2) - 0.25)


def test_several_wrappers(tmp_path):
    """A choice is the user's: the sentence names both, and a key chooses, also within dicts."""
    path = tmp_path / 'in.pth'
    other = {key: 2 * value for key, value in denoised_state().items()}
    torch.save(dict(student=denoised_state(), teacher=other, run=dict(ema=other)), path)
    with pytest.raises(CheckpointError, match='student, teacher.*--key student'):
        fuse_checkpoint(path, tmp_path / 'out.pth')
    for key in ('teacher', 'run.ema'):
        assert torch.equal(open_checkpoint(path, key=key).weights['fc.weight'], 2 * torch.eye(2))
    with pytest.raises(CheckpointError, match='has no ema; it has student, teacher, run'):
        open_checkpoint(path, key='ema')
