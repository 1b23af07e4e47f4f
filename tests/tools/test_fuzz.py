"""Thousands of malformed inputs for the tools: one sentence or a whole output, no traceback, no hang, no code."""

import copy
import gzip
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardening_helpers import (
    Command,
    as_config,
    commands,
    make_small,
    read_checkpoint,
    small_config,
    survive,
    time_limit,
)
from helpers import randomise
from mmdenoiserep import apply_denoiserep
from mmdenoiserep.core import CheckpointError, Moments, load_moments, save_moments

COUNTS = dict(fuse=800, transreid=150, vmamba=150, moments=300, source=60, images=60, matches=100, articles=100)
"""Malformed inputs of each test; :data:`CONFIGS`, :data:`OPTIONS` and :data:`CHECKPOINTS` have the others."""


def fuzz(count, check, **strategies):
    """Calls a check with many drawn values, always the same ones, and counts them."""
    seen = 0

    @settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(**strategies)
    def run(**drawn):
        nonlocal seen
        seen += 1
        check(**drawn)

    run()
    assert seen >= count


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __call__(self):
        """Lets pickle take it for a function."""

    def __reduce__(self):
        return self.call


def nested(depth, wide=False):
    """Lists in lists; a copy of wide ones has ``2 ** depth`` items, and a file a few bytes."""
    value = []
    for _ in range(depth):
        value = [value, value] if wide else [value]
    return value


def knot():
    value = []
    value.append(value)
    return value


ODD = {
    'none': lambda: None,
    'true': lambda: True,
    'huge': lambda: 2**70,
    'negative': lambda: -1,
    'nan': lambda: float('nan'),
    'bytes': lambda: b'\x80',
    'escape': lambda: 'a\x1b[31m\nb\u2028\u202e',
    'surrogate': lambda: '\ud800',
    'long': lambda: 'x' * 5000,
    'list': lambda: [],
    'dict': lambda: {},
    'numbered': lambda: {1: 2, (3, None): 4},
    'mixed': lambda: {1: torch.zeros(1), 'a': torch.zeros(1)},
    'knot': knot,
    'deep': lambda: nested(2000),
    'doubled': lambda: nested(60, wide=True),
    'scalar': lambda: torch.zeros(()),
    'empty': lambda: torch.zeros(0),
    'one': lambda: torch.zeros(1),
    'cube': lambda: torch.zeros(2, 2, 2),
    'many_dims': lambda: torch.zeros([1] * 20),
    'infinite': lambda: torch.full((4, 4), torch.inf),
    'bool': lambda: torch.ones(4, 4, dtype=torch.bool),
    'int64': lambda: torch.full((4, 4), 2**62),
    'uint16': lambda: torch.ones(4, 4).to(torch.uint16),
    'complex': lambda: torch.ones(4, 4, dtype=torch.complex64),
    'float8': lambda: torch.ones(4, 4).to(torch.float8_e4m3fn),
    'sparse': lambda: torch.eye(4).to_sparse(),
    'csr': lambda: torch.eye(4).to_sparse_csr(),
    'quantised': lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
    'meta': lambda: torch.ones(4, 4, device='meta'),
    'parameter': lambda: torch.nn.Parameter(torch.ones(4, 4)),
    'endless': lambda: torch.zeros(1).expand(2**25, 2**25),
    'array': lambda: np.ones(3),
    'storage': lambda: torch.zeros(3).untyped_storage(),
    'layer': lambda: torch.nn.Linear(1, 1),
    'class': lambda: Payload,
}
"""Values that no checkpoint should have where they are put."""


def payloads(marker):
    """Returns objects that create a marker if any code of theirs runs."""
    marker = str(marker)
    return [
        Payload(os.mkdir, marker),
        Payload(os.system, f'mkdir {marker}'),
        Payload(exec, f'import os; os.mkdir({marker!r})'),
        Payload(eval, f'__import__("os").mkdir({marker!r})'),
        Payload(map, os.mkdir, [marker]),
        Payload(list, Payload(map, os.mkdir, [marker])),
        Payload(Payload(getattr, os, 'mkdir'), marker),
        Payload(Path.mkdir, Path(marker)),
        Payload(torch.save, {}, marker),
        Payload(np.save, marker, [1]),
        Payload(torch.load, marker),
    ]


def places(content, path=()):
    """Yields the way to every entry of nested dicts and lists, as far as they are not endless."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list) and len(path) < 8:
            yield from places(value, (*path, key))


def entry(draw, content, ways=()):
    """Draws an entry of nested dicts and lists: its owner and its key, or one of some other ways."""
    *way, key = draw(st.sampled_from([*ways, *places(content)]))
    for part in way:
        content = content[part]
    return content, key


def spoil_tensor(draw, what, value):
    """Draws another shape, or values that are not usual, for a small tensor that every operation takes, or None."""
    usual = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
    if not usual or value.dtype not in (torch.float32, torch.int64) or value.numel() >= 2**20:
        return None
    if what == 'reshape' and value.dim():
        views = [value[:, None], value[..., :0], value[None], value.flatten(), value.expand(2, *value.shape)]
        return draw(st.sampled_from(views))
    if what == 'spoil' and value.is_floating_point():
        return value * draw(st.sampled_from([torch.nan, torch.inf, -0.0, 1e38, 1e-45]))
    return None


@st.composite
def spoiled_contents(draw, content, marker):
    """A checkpoint in which some entries are replaced, removed or renamed; or something else altogether."""
    odd = st.sampled_from(sorted(ODD)).map(lambda name: ODD[name]()) | st.sampled_from(payloads(marker))
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        owner, key = entry(draw, content, ways=[(None,)])
        if key is None:
            return draw(odd)
        what = draw(st.sampled_from(['replace', 'replace', 'replace', 'remove', 'rename', 'reshape', 'spoil']))
        if what == 'remove':
            del owner[key]
        elif what == 'rename' and isinstance(owner, dict):
            name = draw(st.text() | st.sampled_from(['\ud800', '', 'a\nb\x1b[1m', 'module.x', 5, None, ('t',)]))
            owner[name if draw(st.booleans()) or not isinstance(name, str) else f'{name}{key}'] = owner.pop(key)
        else:
            spoiled = spoil_tensor(draw, what, owner[key])
            owner[key] = draw(odd) if spoiled is None else spoiled
        if not any(places(content)):
            break
    return content


@st.composite
def spoiled_bytes(draw, whole):
    """A file that is cut, overwritten, or repeated somewhere."""
    what = draw(st.sampled_from(['cut', 'flip', 'remove', 'insert', 'zero', 'noise']))
    at = draw(st.integers(0, len(whole) - 1))
    if what == 'cut':
        return whole[:at]
    if what == 'flip':
        spoiled = bytearray(whole)
        for place in draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
            spoiled[place] ^= draw(st.integers(1, 255))
        return bytes(spoiled)
    if what == 'remove':
        return whole[:at] + whole[at + draw(st.integers(1, 300)) :]
    if what == 'insert':
        return whole[:at] + draw(st.binary(min_size=1, max_size=50)) + whole[at:]
    if what == 'zero':
        length = draw(st.integers(1, 500))
        return whole[:at] + bytes(len(whole[at : at + length])) + whole[at + length :]
    return draw(st.sampled_from([b'', b'PK\3\4', b'\x80\2', b'{"a": 1}', whole[:64]])) + draw(st.binary(max_size=300))


@st.composite
def spoiled_archives(draw, whole):
    """A sound zip archive whose members are spoiled, exchanged, removed, renamed, compressed or too many."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = sorted(members)
    for _ in range(draw(st.integers(1, 2))):
        name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        what = draw(st.sampled_from(['spoil', 'pickle', 'exchange', 'remove', 'rename', 'add']))
        if name not in members or other not in members:
            continue
        if what == 'spoil' and members[name]:
            members[name] = draw(spoiled_bytes(members[name]))
        elif what == 'pickle':
            member = next(m for m in names if m.endswith('data.pkl'))
            members[member] = draw(spoiled_bytes(members.get(member) or b'.'))
        elif what == 'exchange':
            members[name], members[other] = members[other], members[name]
        elif what == 'remove':
            del members[name]
        elif what == 'rename':
            members[draw(st.sampled_from(['x', '../x', '/x', 'é/data.pkl', f'{name}x']))] = members.pop(name)
        else:
            members[draw(st.sampled_from(['constants.pkl', 'code/x.py', 'archive/constants.pkl', 'x/y']))] = b'\x80\2.'
    packed = io.BytesIO()
    how = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(packed, 'w', how) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return packed.getvalue()


def saved(content, zipped):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def try_saving(content, zipped):
    """Returns the bytes of a file; what torch can't write is written by pickle, or replaced by a pickle of nothing."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        for dump in (lambda: saved(content, zipped), lambda: pickle.dumps(content)):
            with suppress(Exception):
                return dump()
        return b'.'
    finally:
        sys.setrecursionlimit(limit)


def spoiled_files(content, marker):
    archive, legacy = saved(content, True), saved(content, False)
    made = st.builds(try_saving, spoiled_contents(content, marker), st.booleans())
    return made | made | spoiled_archives(archive) | spoiled_bytes(archive) | spoiled_bytes(legacy)


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder to work in, and a path beside it that foreign code would create."""
    folder = tmp_path_factory.mktemp('fuzz')
    return folder, folder.parent / f'{folder.name}-marker'


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp('small'))


def fuzz_files(name, tool, arguments, content, work):
    source, target = work[0] / 'in.pth', work[0] / 'out.pth'
    command = Command(tool, [*arguments, source, target], target, read_checkpoint)
    fuzz_command(COUNTS[name], command, source, content, work)


def fuzz_command(count, command, source, content, work):
    """Runs a command while one of the files that it reads is malformed."""
    folder, marker = work

    def check(file):
        source.write_bytes(file)
        survive(folder, command)
        assert not marker.exists(), 'code of the file ran'

    fuzz(count, check, file=spoiled_files(content, marker))


def test_fuse_checkpoint(work):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    apply_denoiserep(model, [dict(pattern='0'), dict(pattern='2', rank=1)], example_input=torch.zeros(1, 1, 1, 1))
    content = dict(
        meta={'epoch': 3, 'classes': ['a'], 7: 'seven'}, state_dict=dict(randomise(model).state_dict()), optimizer={}
    )
    fuzz_files('fuse', 'fuse_checkpoint', [], content, work)


@pytest.mark.parametrize(
    ('name', 'key', 'prefix', 'names'),
    [
        (
            'transreid',
            'teacher',
            'module.backbone.',
            ['cls_token', 'pos_embed', 'patch_embed.proj.weight', 'blocks.0.norm1.weight', 'head.x', 'norm.bias'],
        ),
        (
            'vmamba',
            'model',
            '',
            ['patch_embed.0.weight', 'classifier.norm.weight', 'classifier.head.weight', 'layers.0.blocks.0.x'],
        ),
    ],
)
def test_convert_checkpoint(name, key, prefix, names, work):
    content = {key: {prefix + each: torch.ones(2) for each in names}, 'epoch': 3}
    fuzz_files(name, 'convert_checkpoint', [name], content, work)


def test_files_of_moments(work):
    folder, marker = work
    path = folder / 'moments.pth'
    moments = {'a': Moments.of(torch.randn(1, 3, 9)), 'b': Moments.of(torch.randn(2, 1, 9))}
    save_moments(moments, path, dict(weights='x'))
    content = torch.load(path, weights_only=True)

    def check(file):
        path.write_bytes(file)
        with time_limit(), suppress(CheckpointError):
            load_moments(path)
        assert not marker.exists(), 'code of the file ran'

    fuzz(COUNTS['moments'], check, file=spoiled_files(content, marker))


# Malformed configs

PLAIN_ODD = {
    'none': None,
    'true': True,
    'huge': 2**70,
    'negative': -1,
    'nan': float('nan'),
    'float': 0.5,
    'bytes': b'\x80',
    'text': 'nothing',
    'empty': '',
    'lines': 'a\nb\x1b[31m',
    'surrogate': '\ud800',
    'pattern': '(',
    'list': [],
    'pair': [1, 'a'],
    'dict': {},
    'type': dict(type='NoSuchThing'),
    'wrong': dict(type='ResNet', depth=7),
    'other': dict(type='mmdet.Resize', scale=(8, 8)),
    'numbered': {1: 2},
    'deep': nested(300),
}


@st.composite
def spoiled_data(draw, content, write):
    """The text of plain data in which entries are replaced, removed or renamed, or of which a part is spoiled."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(0, 2))):
        owner, key = entry(draw, content)
        what = draw(st.sampled_from(['replace', 'replace', 'remove', 'rename']))
        if what == 'remove':
            del owner[key]
        elif what == 'rename' and isinstance(owner, dict):
            owner[f'{key}x'] = owner.pop(key)
        else:
            owner[key] = PLAIN_ODD[draw(st.sampled_from(sorted(PLAIN_ODD)))]
        if not content:
            break
    text = write(content).encode('utf-8', 'backslashreplace')
    return draw(st.just(text) | st.just(text) | spoiled_bytes(text)) if text else text


def as_json(content):
    return json.dumps(content, default=str)


CONFIGS = dict(print_targets=100, verify=40, moments=40, schedule=10, domain=10, extract=30, draw=40, test=20, train=20)
CONFIGS |= dict(visualize=10, export=20)
OPTIONS = dict(print_targets=40, moments=15, extract=15, draw=15, test=15, train=15, visualize=10, export=10)
CHECKPOINTS = dict(verify=20, moments=60, schedule=10, domain=20, extract=40, test=15, train=12, visualize=15)
CHECKPOINTS |= dict(export=15)


@pytest.mark.parametrize('name', CONFIGS)
def test_configs(name, work, small):
    """A run of ``train`` or ``test`` that has begun keeps its traceback, which is for the author of the model."""
    folder, _ = work
    config = folder / 'config.py'
    command = without_picture(commands(small, folder, config=config)[name])

    def check(text):
        config.write_bytes(text)
        survive(folder, command)

    fuzz(CONFIGS[name], check, text=spoiled_data(small_config(small, reid=name == 'extract'), as_config))


@st.composite
def spoiled_options(draw, config):
    """Words for ``--cfg-options`` whose keys lead through lists, numbers and nothing, with values of any kind."""
    ways = ['.'.join(map(str, way)) for way in places(config)]
    ends = st.sampled_from(['', '', '.x', '.0', '.99.type', '.-1', '..', '.type'])
    values = ['1', 'None', '', '[1,', '(1,2)', '"', "{'a': 1}", 'x.y', 'NoSuchThing', '-1', '1e999', 'é\x1b']
    words = st.builds('{}{}={}'.format, st.sampled_from(ways) | st.text(max_size=5), ends, st.sampled_from(values))
    return draw(st.lists(words, min_size=1, max_size=2))


@pytest.mark.parametrize('name', OPTIONS)
def test_options(name, work, small):
    folder, _ = work
    command = without_picture(commands(small, folder)[name])

    def check(words):
        survive(folder, command._replace(args=[*command.args, '--cfg-options', *words]))

    fuzz(OPTIONS[name], check, words=spoiled_options(small_config(small, reid=name == 'extract')))


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoints(name, work, small):
    source = work[0] / 'in.pth'
    command = without_picture(commands(small, work[0], checkpoint=source)[name])
    file = dict(extract='reid.pth', export='fused.pth').get(name, 'config.pth')
    fuzz_command(CHECKPOINTS[name], command, source, torch.load(small / file), work)


def without_picture(command):
    """Leaves out the picture of a calibration, which takes a second."""
    drawn = {'schedule', 'domain'} & set(map(str, command.args))
    return command._replace(args=[*command.args, '--dry-run']) if drawn else command


def test_sources_of_a_domain_fit(work, small):
    source = work[0] / 'in.pth'
    command = without_picture(commands(small, work[0])['domain'])
    args = [source if arg == small / 'moments.pth' else arg for arg in command.args]
    command = command._replace(args=args)
    fuzz_command(COUNTS['source'], command, source, torch.load(small / 'moments.pth'), work)


def test_images(work, small):
    folder, _ = work
    images = folder / 'images'
    images.mkdir()
    whole = (small / 'images/cat/0.png').read_bytes()
    known = commands(small, folder)
    extract, moments = known['extract'], known['moments']
    runs = [
        extract._replace(args=[images if arg == small / 'images' else arg for arg in extract.args]),
        moments._replace(args=[*moments.args, '--images', images]),
        Command('corrupt_images', [images, folder / 'copy', 'blur'], folder / 'copy', os.listdir),
    ]

    def check(file, command):
        (images / 'a.png').write_bytes(file)
        (images / 'b.png').write_bytes(whole)
        survive(folder, command)

    fuzz(COUNTS['images'], check, file=spoiled_bytes(whole), command=st.sampled_from(runs))
    shutil.rmtree(images)


def test_matches(work, small):
    folder, _ = work
    matches = folder / 'matches.json'
    command = commands(small, folder)['draw']
    command.args[1] = matches

    def check(text):
        matches.write_bytes(text)
        survive(folder, command)

    fuzz(COUNTS['matches'], check, text=spoiled_data(json.loads((small / 'matches.json').read_text()), as_json))


@st.composite
def spoiled_articles(draw, files):
    """The gzipped files of Fashion-MNIST, one of which is spoiled, outside or inside."""
    name = draw(st.sampled_from(sorted(files)))
    inside = draw(st.booleans())
    file = draw(spoiled_bytes(files[name] if inside else gzip.compress(files[name], mtime=0)))
    return {**{n: gzip.compress(f, mtime=0) for n, f in files.items()}, name: gzip.compress(file) if inside else file}


def test_articles(work):
    folder, _ = work
    count, side = 40, 28
    header = count.to_bytes(4, 'big')
    shape = header + side.to_bytes(4, 'big') * 2
    pixels = np.random.default_rng(0).integers(0, 255, (count, side, side), dtype=np.uint8)
    files = {}
    for split in ('train', 't10k'):
        files[f'{split}-images-idx3-ubyte.gz'] = b'\0\0\x08\3' + shape + pixels.tobytes()
        files[f'{split}-labels-idx1-ubyte.gz'] = b'\0\0\x08\1' + header + bytes(i % 10 for i in range(count))
    source, target = folder / 'source', folder / 'made'
    source.mkdir()
    reid = ['--ids', 2, '--test-ids', 2, '--cameras', 2, '--per-camera', 1, '--size', 32]
    tools = dict(make_scenes=['--train', 1, '--val', 1, '--size', 64], make_reid=reid, prepare_fashion_mnist=[])

    def check(files, tool):
        for name, file in files.items():
            (source / name).write_bytes(file)
        survive(folder, Command(tool, [target, *tools[tool], '--source', source], target, os.listdir))

    fuzz(COUNTS['articles'], check, files=spoiled_articles(files), tool=st.sampled_from(list(tools)))
    shutil.rmtree(source)
