"""tools/calibrate.py as a user meets it: every kind of model, every mode, bad input."""

import gzip
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmdenoiserep  # noqa: F401
from helpers import ROOT, randomise
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.images import Batches, open_images
from mmdenoiserep.apis.model import build_model
from mmdenoiserep.core import Moments, load_moments
from mmdenoiserep.core.files.fused import STAMP
from tools_helpers import find_tool, python, run_tool, sentence

DEMO = ROOT / 'configs/demo'

CONFIGS = [
    'vit_fashion-mnist',
    'swin_fashion-mnist',
    'resnet_fashion-mnist',
    'vmamba_fashion-mnist',
    'mask-rcnn_swin_scenes',
    'segformer_mit_scenes',
    'vit_fashion-reid',
]


def write_articles(folder, images, prefix):
    """Writes grey images, (N, 28, 28), as Fashion-MNIST's files, with labels in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    count, side = (number.to_bytes(4, 'big') for number in (len(images), 28))
    (folder / f'{prefix}-images-idx3-ubyte').write_bytes(b'\0\0\x08\x03' + count + side + side + images.tobytes())
    labels = (np.arange(len(images)) % 10).astype(np.uint8)
    (folder / f'{prefix}-labels-idx1-ubyte').write_bytes(b'\0\0\x08\x01' + count + labels.tobytes())


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with the data of all small configs; the images to run on are darker and noisy."""
    root = tmp_path_factory.mktemp('calibrate')
    data = root / 'work_dirs'
    idx = gzip.decompress((ROOT / 'demo/fashion-mnist/t10k-images-idx3-ubyte.gz').read_bytes())
    articles = np.frombuffer(idx, np.uint8, offset=16).reshape(-1, 28, 28)[:160]
    noise = np.random.default_rng(0).normal(0, 40, articles.shape)
    write_articles(data / 'fashion-mnist', articles[:100], 'train')
    write_articles(data / 'fashion-mnist', (articles * 0.8 + noise).clip(0, 255).astype(np.uint8)[100:], 't10k')
    run_tool('make_scenes', data / 'scenes', '--train', 24, '--val', 12)
    run_tool('make_reid', data / 'fashion-reid', '--ids', 6, '--test-ids', 4)
    for folder in ('scenes/images/validation', 'fashion-reid/query', 'fashion-reid/bounding_box_test'):
        for i, path in enumerate(sorted((data / folder).iterdir())):
            image = cv2.imread(str(path))
            spoiled = image * 0.8 + np.random.default_rng(i).normal(0, 40, image.shape)
            cv2.imwrite(str(path), spoiled.clip(0, 255).astype(np.uint8))
    return root


@pytest.fixture(autouse=True)
def in_work(work, monkeypatch):
    monkeypatch.chdir(work)


def checkpoint(name):
    """Returns the path of a vanilla checkpoint with random weights and statistics, written once."""
    path = Path(f'{name}.pth').absolute()
    if not path.exists():
        torch.manual_seed(0)
        model = randomise(build_model(load_config(DEMO / f'{name}.py')))
        for module in model.modules():  # trained ones are not zero, and not one
            if isinstance(module, torch.nn.LayerNorm):
                torch.nn.init.normal_(module.weight, 1, 0.2)
                torch.nn.init.normal_(module.bias, 0, 0.2)
        meta = dict(epoch=3, note='kept')
        torch.save(dict(meta=meta, state_dict=model.state_dict(), optimizer=dict(lr=1.0)), path)
    return path


def source(name):
    """Returns the path of the moments of the training images, gathered once."""
    path = Path(f'{name}_source.pth').absolute()
    if not path.exists():
        run_tool('calibrate', 'moments', DEMO / f'{name}.py', checkpoint(name), path, '--stride', 1)
    return path


def fit(name, output, *args, accept='all'):
    files = DEMO / f'{name}.py', checkpoint(name), output
    run_tool('calibrate', 'domain', *files, '--source', source(name), '--accept', accept, '--verify', *args)
    return output


def state_of(path):
    return torch.load(path, weights_only=True)['state_dict']


def test_a_model_whose_state_dict_leaves_weights_out_is_refused(tmp_path):
    """What is fitted to the weights behind LoRA would not be in the file."""
    cfg = Config.fromfile(DEMO / 'vit_fashion-mnist.py')
    lora = dict(type='LoRAModel', module=cfg.model.backbone, alpha=1, rank=2, targets=[dict(type='qkv')])
    cfg.merge_from_dict(dict(model=dict(backbone=dict(_delete_=True, **lora))))
    cfg.dump(tmp_path / 'lora.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'lora.pth')
    text = sentence('calibrate', 'moments', tmp_path / 'lora.py', tmp_path / 'lora.pth', tmp_path / 'out.pth')
    assert 'LoRA' in text and not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('name', CONFIGS)
def test_a_domain_fit_brings_the_first_features_home_in_the_unchanged_config(name, tmp_path, capsys):
    plot = tmp_path / 'spectra.png'
    output = fit(name, tmp_path / 'fitted.pth', '--stride', 1, '--plot', plot)
    shown = capsys.readouterr().out
    assert (
        'the weights fit the config without denoising exactly' in shown
        and 'TOO LARGE' not in shown
        and '(--memory)' not in shown
    )
    assert 'covariance corrected' in shown and 'mean corrected' in shown
    compared = re.findall(r'^(nothing|first|early|all|half-strength) .*%', shown, re.MULTILINE)
    assert {'nothing', 'first', 'half-strength'} <= set(compared), 'where late layers have no support, all is early'
    assert re.search(r'^on \d+ images that were not fitted on', shown, re.MULTILINE)
    assert plot.stat().st_size > 10_000 and f'spectra: {plot}' in shown
    before, after = (torch.load(path, weights_only=path == output) for path in (checkpoint(name), output))
    assert after.keys() == {'meta', 'state_dict'} and after['meta']['note'] == 'kept'
    assert after['meta'][STAMP]['mode'] == 'domain' and after['meta'][STAMP]['fused']
    assert [(k, v.shape, v.dtype) for k, v in before['state_dict'].items()] == [
        (k, v.shape, v.dtype) for k, v in after['state_dict'].items()
    ]
    heads = [key for key in after['state_dict'] if not key.startswith(('backbone.', 'neck.'))]
    assert heads and all(torch.equal(before['state_dict'][key], after['state_dict'][key]) for key in heads)

    # On the images it was fitted to, the first layer must come closer to the moments of the training domain.
    first, training = next(iter(load_moments(source(name))[0].items()))
    distances = []
    for state in (before['state_dict'], after['state_dict']):
        seen = outputs_of(name, first.removeprefix('backbone.'), state)
        distances.append(
            [relative_distance(getattr(seen, key), getattr(training, key)) for key in ('mean', 'covariance')]
        )
    (mean, covariance), (mean_after, covariance_after) = distances
    assert covariance_after < 0.6 * covariance
    assert mean_after < mean * (1 + 1e-4) or f'{first}.bias' not in before['state_dict'], (
        'or the norm behind it holds the constant'
    )


def outputs_of(name, layer, state):
    """Returns the moments of what a layer of the backbone gives on the test images."""
    model, seen = build_model(load_config(DEMO / f'{name}.py')), []
    model.load_state_dict(state)
    layer = model.backbone.get_submodule(layer)
    layer.register_forward_hook(lambda layer, args, out: seen.append(out.detach().transpose(0, 1).flatten(1)[None]))
    for batch in Batches(model, open_images(Config.fromfile(DEMO / f'{name}.py'), 'test'), 32):
        with torch.no_grad():
            model.backbone(batch)
    return Moments.of(torch.cat(seen, -1))


def relative_distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_small_batches_and_one_batch_come_to_the_same(tmp_path, capsys):
    options = dict(accept='early')
    once = state_of(fit('resnet_fashion-mnist', tmp_path / 'once.pth', '--stride', 1, '--batch-size', 48, **options))
    often = state_of(fit('resnet_fashion-mnist', tmp_path / 'often.pth', '--stride', 1, '--batch-size', 7, **options))
    assert capsys.readouterr().out.count('8 layers calibrated (domain) on 48 images') == 2
    assert not list(tmp_path.glob('*.png')), 'no plot is asked for'
    for key, value in once.items():
        torch.testing.assert_close(often[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('memory', 'few'), [(0.002, True), (4, False)])
def test_memory_decides_how_many_images_are_taken(memory, few, tmp_path, capsys):
    """One image takes about 60 KiB."""
    fit('resnet_fashion-mnist', tmp_path / 'few.pth', '--memory', memory)
    shown = capsys.readouterr().out
    taken = int(re.search(r'\(domain\) on (\d+) images', shown)[1])
    assert (f'takes {taken} of 48 images, whose features fit into {memory:g} GiB (--memory)' in shown) == few
    assert 1 < taken < 47 if few else taken == 48


def test_a_folder_gives_what_the_data_set_gives(tmp_path):
    config, weights = DEMO / 'mask-rcnn_swin_scenes.py', checkpoint('mask-rcnn_swin_scenes')
    folder = ['--images', 'work_dirs/scenes/images/training', '--stride', 1]
    run_tool('calibrate', 'moments', config, weights, tmp_path / 'folder.pth', *folder)
    expected, about = load_moments(source('mask-rcnn_swin_scenes'))
    actual, _ = load_moments(tmp_path / 'folder.pth')
    assert about['images'] == 24 and actual.keys() == expected.keys()
    for name in expected:
        assert relative_distance(actual[name].second_moment, expected[name].second_moment) < 1e-5


def test_a_folder_of_grey_images_for_a_grey_model(tmp_path):
    images = tmp_path / 'images'
    images.mkdir()
    for i in range(10):
        cv2.imwrite(str(images / f'{i}.png'), np.random.default_rng(i).integers(0, 255, (28, 28), np.uint8))
    out = fit('vit_fashion-mnist', tmp_path / 'grey.pth', '--images', images)
    assert not torch.equal(
        *(state_of(p)['backbone.patch_embed.projection.weight'] for p in (out, checkpoint('vit_fashion-mnist')))
    )


def test_images_of_different_sizes_are_fitted_together(tmp_path, capsys):
    images = tmp_path / 'images'
    images.mkdir()
    for i in range(13):
        image = np.random.default_rng(i).integers(0, 255, (64 + 32 * (i % 2), 96, 3), np.uint8)
        cv2.imwrite(str(images / f'{i}.png'), image)
    fit('mask-rcnn_swin_scenes', tmp_path / 'out.pth', '--images', images, accept='early')
    shown = capsys.readouterr().out
    assert 'layers calibrated (domain) on 11 images' in shown and 'on 2 images that were not fitted on' in shown


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (
            'model.data_preprocessor.mean=[100.0,116.28,103.53]',
            'another data_preprocessor.mean than the config has ([123',
        ),
        (
            'model.data_preprocessor.bgr_to_rgb=False',
            'another data_preprocessor.bgr_to_rgb than the config has (True, not',
        ),
        ('test_dataloader.dataset.pipeline.1.scale_factor=0.5', 'another pipeline than the config has (Resize'),
    ],
)
def test_moments_of_other_inputs_are_refused(change, said, tmp_path):
    """The features of the training images would differ by the preprocessing too."""
    name = 'mask-rcnn_swin_scenes'
    files = DEMO / f'{name}.py', checkpoint(name), tmp_path / 'no.pth'
    assert said in sentence('calibrate', 'domain', *files, '--source', source(name), '--cfg-options', change)
    assert not (tmp_path / 'no.pth').exists()


def test_schedule_mode_writes_a_denoised_checkpoint_that_fuses(tmp_path, capsys):
    name, output = 'vit_fashion-mnist', tmp_path / 'denoised.pth'
    config = DEMO / f'{name}_denoiserep.py'
    run_tool('calibrate', 'schedule', config, checkpoint(name), output, '--verify')
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith(('patch_embed', 'layers.'))]
    rows = [row for row in rows if len(row) == 6]
    losses = [[float(value) for value in row[-3:]] for row in rows]
    assert len(rows) == 17 and all(1.01 > start >= loss >= optimum > 0 for start, loss, optimum in losses)
    assert sum(start for start, *_ in losses) > sum(loss for _, loss, _ in losses) > sum(low for *_, low in losses)
    state = state_of(output)
    assert any(value.any() for key, value in state.items() if '.denoiser.' in key)
    vanilla = state_of(checkpoint(name))
    assert all(torch.equal(state[key], value) for key, value in vanilla.items())
    run_tool('fuse_checkpoint', output, tmp_path / 'fused.pth', '--verify', config)
    assert state_of(tmp_path / 'fused.pth').keys() == vanilla.keys()
    run_tool('calibrate', 'schedule', config, checkpoint(name), tmp_path / 'prior.pth', '--prior', 1000)
    assert any(not torch.equal(state[key], value) for key, value in state_of(tmp_path / 'prior.pth').items())
    assert 'fused already' in sentence('calibrate', 'schedule', config, tmp_path / 'fused.pth', tmp_path / 'no.pth')


def test_a_domain_fit_folds_denoisers_first(tmp_path):
    name, denoised, moments = 'vit_fashion-mnist', tmp_path / 'denoised.pth', tmp_path / 'moments.pth'
    config = DEMO / f'{name}_denoiserep.py'
    run_tool('calibrate', 'schedule', config, checkpoint(name), denoised)
    run_tool('calibrate', 'moments', config, denoised, moments)
    files = config, denoised, tmp_path / 'out.pth'
    run_tool('calibrate', 'domain', *files, '--source', moments, '--accept', 'all')
    assert state_of(tmp_path / 'out.pth').keys() == state_of(checkpoint(name)).keys()


def test_what_is_accepted_changes(tmp_path):
    name = 'vit_fashion-mnist'
    before = state_of(checkpoint(name))
    files = [fit(name, tmp_path / f'{accept}.pth', accept=accept) for accept in ('first', 'early', 'all')]
    files += [fit(name, tmp_path / 'half.pth', accept='half-strength')]
    states = [state_of(path) for path in files]
    first, early, everything, half = (
        {key.rpartition('.')[0] for key, value in state.items() if not torch.equal(value, before[key])}
        for state in states
    )
    late = ('backbone.layers.2', 'backbone.layers.3')
    assert first == {'backbone.patch_embed.projection'} and everything == half
    assert first < early < everything and early == {layer for layer in everything if not layer.startswith(late)}
    for key, value in states[3].items():
        torch.testing.assert_close(value, (before[key] + states[2][key]) / 2)
    stamps = [torch.load(path, weights_only=True)['meta'][STAMP] for path in files]
    assert [(stamp['part'], stamp['layers']) for stamp in stamps] == [
        *(('first', 1), ('early', len(early)), ('all', len(everything)), ('half-strength', len(everything)))
    ]


def chosen(name, output, *args):
    """Runs a fit whose check decides, and returns the exit code."""
    files = DEMO / f'{name}.py', checkpoint(name), output
    with pytest.raises(SystemExit) as stopped:
        run_tool('calibrate', 'domain', *files, '--source', source(name), *args)
        raise SystemExit(0)
    return stopped.value.code


def test_nothing_is_written_where_there_is_nothing_to_correct(tmp_path, capsys):
    """The images are those of the moments."""
    output = tmp_path / 'no.pth'
    assert chosen('vit_fashion-mnist', output, '--split', 'train', '--stride', 1) == 3
    assert 'nothing was written: these images support no correction of any layer' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_images_are_damaged_in_places(tmp_path, capsys):
    images = tmp_path / 'images'
    images.mkdir()
    for i, image in enumerate(open_images(Config.fromfile(DEMO / 'segformer_mit_scenes.py'), 'train')):
        damaged = image['inputs'].permute(1, 2, 0).numpy().copy()
        damaged[:32, :32] = 255 * (np.indices((32, 32)).sum(0) % 2)[..., None]
        cv2.imwrite(str(images / f'{i}.png'), damaged)
    assert chosen('segformer_mit_scenes', tmp_path / 'no.pth', '--images', images, '--dry-run') == 3
    assert 'nothing was written: the images are damaged in places' in capsys.readouterr().out


def test_what_the_check_chooses_is_written(tmp_path, capsys):
    output = tmp_path / 'out.pth'
    assert chosen('segformer_mit_scenes', output, '--verify') == 0
    name = re.search(r'^chosen: (\S+)$', capsys.readouterr().out, re.MULTILINE)[1]
    accepted = fit('segformer_mit_scenes', tmp_path / 'accepted.pth', accept=name)
    assert all(torch.equal(value, state_of(accepted)[key]) for key, value in state_of(output).items())


def test_warnings(tmp_path, capsys):
    (tmp_path / 'other').mkdir()
    for i, image in enumerate(open_images(Config.fromfile(DEMO / 'vit_fashion-mnist.py'), 'train')):
        cv2.imwrite(str(tmp_path / f'other/{i}.png'), 255 - image['inputs'][0].numpy())
    fit('vit_fashion-mnist', tmp_path / 'other.pth', '--images', tmp_path / 'other', accept='first')
    assert 'look like another data set altogether' in capsys.readouterr().out


def test_moments_of_a_fitted_checkpoint_give_a_warning(tmp_path, capsys):
    name = 'vit_fashion-mnist'
    config, fitted = DEMO / f'{name}.py', fit(name, tmp_path / 'fitted.pth')
    for path, said in ((checkpoint(name), False), (fitted, True)):
        capsys.readouterr()
        run_tool('calibrate', 'moments', config, path, tmp_path / f'{path.stem}_moments.pth', '--num-images', 8)
        assert (f'{path} is fitted to a domain already' in capsys.readouterr().out) == said


def test_a_map_that_amplifies_rounding_is_refused(tmp_path):
    """Images of nearly one colour differ by a few pixels, which the fit stretches to the variance of real images."""
    (tmp_path / 'plain').mkdir()
    for i in range(20):
        image = np.full((28, 28), 250, np.uint8) - (np.indices((28, 28)).sum(0) == i)
        cv2.imwrite(str(tmp_path / f'plain/{i}.png'), image)
    files = DEMO / 'vit_fashion-mnist.py', checkpoint('vit_fashion-mnist'), tmp_path / 'no.pth'
    options = ['--source', source('vit_fashion-mnist'), '--images', tmp_path / 'plain', '--accept', 'all', '--verify']
    text = sentence('calibrate', 'domain', *files, *options)
    assert 'patch_embed.projection moves by' in text and 'which amplifies rounding: look at the images' in text
    assert not (tmp_path / 'no.pth').exists()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    files = DEMO / 'vit_fashion-mnist.py', checkpoint('vit_fashion-mnist'), tmp_path / 'no.pth'
    options = ['--source', source('vit_fashion-mnist'), '--accept', 'first', '--dry-run']
    run_tool('calibrate', 'domain', *files, *options)
    shown = capsys.readouterr().out
    assert 'patch_embed.projection' in shown and 'nothing was written' in shown
    assert not list(tmp_path.iterdir())


def test_no_plot_is_written_among_the_images(tmp_path):
    """The next run would read it as an image."""
    images, name = tmp_path / 'images', 'vit_fashion-mnist'
    (images / 'inner').mkdir(parents=True)
    files = [DEMO / f'{name}.py', checkpoint(name)]
    options = ['--source', source(name), '--images', images]
    plot = 'lies among the images, so the next run would read it too; name a path outside'
    for name in ('spectra.png', 'inner/out.png'):
        args = [*files, tmp_path / 'out.pth', *options, '--plot', images / name]
        assert f'{name} {plot}' in sentence('calibrate', 'domain', *args)


def test_files_that_do_not_belong_together(tmp_path):
    name = 'vit_fashion-mnist'
    config, weights, out = DEMO / f'{name}.py', checkpoint(name), tmp_path / 'no.pth'
    other = torch.load(weights, weights_only=True)
    other['state_dict']['backbone.ln1.weight'] += 1
    torch.save(other, tmp_path / 'other.pth')
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    nowhere = ['--cfg-options', 'train_dataloader.dataset.data_root=nowhere']
    for said, *args in (
        ('gathered with other weights', 'domain', config, tmp_path / 'other.pth', out, '--source', source(name)),
        ('holds no moments', 'domain', config, weights, out, '--source', weights),
        ('does not exist', 'domain', config, weights, out, '--source', 'nowhere.pth'),
        ('does not exist', 'domain', config, 'nowhere.pth', out, '--source', source(name)),
        ('does not fit the vanilla model', 'moments', config, checkpoint('swin_fashion-mnist'), out),
        ('no DenoiseRepBackbone', 'schedule', config, weights, out),
        ('is the input itself', 'moments', config, weights, weights, '--overwrite'),
        ('exists', 'moments', config, weights, source(name)),
        ('is not a folder', 'moments', config, weights, out, '--images', 'nowhere'),
        ('broken.png cannot be read', 'moments', config, weights, out, '--images', tmp_path),
        ('cannot be read', 'moments', config, weights, out, *nowhere),
    ):
        assert said in sentence('calibrate', *args)
    assert not out.exists() and not out.with_suffix('.png').exists()


@pytest.mark.parametrize(
    'args',
    [
        'domain a.py b.pth c.pth',
        'domain a.py b.pth c.pth --source x/../c.pth',
        'moments a.py b.pth c.pth --source x',
        'moments a.py b.pth c.pth --verify',
        'moments a.py b.pth c.pth --num-images 0',
        'schedule a.py b.pth c.pth --accept all',
        'domain a.py b.pth c.pth --source x --accept nothing',
        'schedule a.py b.pth c.pth --memory 0',
        'domain a.py b.pth c.pth --source x --prior 1',
        'schedule a.py b.pth c.pth --plot c.pth',
        'schedule a.py b.pth .',
        'a.py b.pth c.pth',
    ],
)
def test_arguments_that_make_no_sense(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_tool('calibrate', *args.split())
    assert stopped.value.code == 2 and 'usage' in capsys.readouterr().err


def test_two_processes_gather_what_one_does(tmp_path):
    name = 'vit_fashion-mnist'
    processes = ['-m', 'torch.distributed.run', '--nproc-per-node=2', '--master-port=29577', find_tool('calibrate')]
    files = DEMO / f'{name}.py', checkpoint(name), tmp_path / 'two.pth'
    options = ['--stride', 1, '--launcher', 'pytorch', '--device', 'cpu']
    printed = python(*processes, 'moments', *files, *options, cwd='.', env=dict(CUDA_VISIBLE_DEVICES=''))
    assert printed.count('moments of') == 1, 'one process prints'
    two, about = load_moments(tmp_path / 'two.pth')
    one, _ = load_moments(source(name))
    assert about['images'] == 100
    for layer in one:
        assert two[layer].count == one[layer].count
        assert relative_distance(two[layer].covariance, one[layer].covariance) < 1e-5


def test_two_processes_check_their_shares_of_the_held_out_images(tmp_path):
    name = 'vit_fashion-mnist'
    processes = ['-m', 'torch.distributed.run', '--nproc-per-node=2', '--master-port=29578', find_tool('calibrate')]
    files = DEMO / f'{name}.py', checkpoint(name), tmp_path / 'two.pth'
    options = ['--source', source(name), '--accept', 'early', '--launcher', 'pytorch', '--device', 'cpu']
    printed = python(*processes, 'domain', *files, *options, cwd='.', env=dict(CUDA_VISIBLE_DEVICES=''))
    assert printed.count('on 12 images that were not fitted on') == 1
    assert printed.count('chosen: early (--accept)') == 1 and '9 layers calibrated (domain) on 48 images' in printed
    assert state_of(tmp_path / 'two.pth').keys() == state_of(checkpoint(name)).keys()
