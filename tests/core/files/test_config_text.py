"""The config of a fused file: that of the training run without denoising, parsed and never executed."""

import pytest
from mmengine.config import Config

from mmdenoiserep.core.files.config_text import REGISTERED, vanilla_text

INNER = dict(type='ResNet', depth=18, init_cfg=dict(type='Pretrained', checkpoint='r18.pth'))
WRAPPED = dict(type='DenoiseRepBackbone', backbone=INNER, targets='all', exclude=[r'layer4\..*'])
LOSS, FUSION, OTHER = (dict(type=kind) for kind in ('DenoiseLossHook', 'DenoiseFusionHook', 'EMAHook'))


def vanilla(**settings):
    return Config.fromstring(vanilla_text(Config(settings).pretty_text), '.py').to_dict()


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        (dict(model=dict(type='FCOS', backbone=WRAPPED)), dict(model=dict(type='FCOS', backbone=INNER))),
        (
            dict(model=dict(type='SoftTeacher', detector=dict(backbone=WRAPPED, neck=[1, dict(a=2)]))),
            dict(model=dict(type='SoftTeacher', detector=dict(backbone=INNER, neck=[1, dict(a=2)]))),
        ),
        (
            dict(model=dict(backbone=[dict(WRAPPED, type='mmdenoiserep.engine.backbone.DenoiseRepBackbone'), OTHER])),
            dict(model=dict(backbone=[INNER, OTHER])),
        ),
        (
            dict(model=dict(backbone=dict(WRAPPED, pretrained='x.pth'))),
            dict(model=dict(backbone=dict(INNER, pretrained='x.pth'))),
        ),
        (dict(model=dict(backbone=dict(WRAPPED, pretrained=None))), dict(model=dict(backbone=INNER))),
        (dict(custom_hooks=[LOSS, OTHER, FUSION]), dict(custom_hooks=[OTHER])),
        (
            dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0), 'head': dict(lr_mult=2.0)})),
            dict(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=2.0)))),
        ),
        (dict(model={'my-key': WRAPPED, 7: 'x'}), dict(model={'my-key': INNER, 7: 'x'})),
        (dict(a=[], custom_imports=dict(imports=['mmdenoiserep'], allow_failed_imports=False)), dict(a=[])),
        (dict(a=(), custom_imports=dict(imports='mmdenoiserep')), dict(a=())),
    ],
)
def test_without_denoising(settings, expected):
    """Wherever the wrapper stands, the backbone in it takes its place; the rest stays."""
    assert vanilla(**settings) == expected


def test_imports_that_are_needed_stay():
    """Modules of the user, of single tasks, and the package itself where a model of its own is left."""
    imports = dict(imports=['mmdenoiserep', 'json', 'mmdenoiserep.tasks.reid'], allow_failed_imports=False)
    kept = dict(imports, imports=['json', 'mmdenoiserep.tasks.reid'])
    assert vanilla(model=WRAPPED, custom_imports=imports)['custom_imports'] == kept
    vmamba = dict(type='DenoiseRepBackbone', backbone=dict(type='VMamba'))
    assert vanilla(model=vmamba, custom_imports=imports) == dict(model=dict(type='VMamba'), custom_imports=imports)


def test_what_the_package_registers_is_known():
    """The names are those that importing the package, and nothing else of it, brings into the registries."""
    import mmdenoiserep
    from mmdenoiserep.core.files.config_text import HOOKS

    assert {*HOOKS, *REGISTERED, 'DenoiseRepBackbone'} == {
        name for name in mmdenoiserep.__all__ if name.endswith('Hook') or name in ('DenoiseRepBackbone', 'VMamba')
    }


def test_other_configs_stay_to_the_letter():
    text = "a = 1; b = dict(c = [1,2])  # note\n\n\nmodel = dict(backbone={'type': 'ResNet'})\n"
    assert vanilla_text(text) == text


def test_statements_on_one_line():
    text = "a = 1; model = dict(backbone=dict(type='DenoiseRepBackbone', backbone=dict(type='A'))); b = 'x\\u2028y'\n"
    read = Config.fromstring(vanilla_text(text), '.py').to_dict()
    assert read == dict(a=1, model=dict(backbone=dict(type='A')), b='x\u2028y')


def test_nothing_runs(tmp_path):
    text = f"x = open({str(tmp_path / 'proof')!r}, 'w')\nmodel = dict(type='DenoiseRepBackbone', backbone=dict(a=1))\n"
    assert 'DenoiseRepBackbone' not in vanilla_text(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['model = dict(', 'a = <function f at 0x1>', '(' * 500, 'x = \0'])
def test_no_python(text):
    with pytest.raises(ValueError, match='no Python'):
        vanilla_text(f'denoiser = {text}')
    assert vanilla_text(text) == text, 'nothing in it is ours'


def test_hooks_among_the_default_ones():
    text = """
custom_imports = dict(imports=['mmdenoiserep', 'mine'])
default_hooks = dict(denoise=dict(type='DenoiseLossHook'), timer=dict(type='IterTimerHook'))
other_hooks = {'fuse': {'type': 'DenoiseFusionHook'}, 'mine': {'type': 'MyHook'}}
"""
    values: dict = {}
    exec(vanilla_text(text), values)
    assert values['custom_imports'] == dict(imports=['mine'])
    assert values['default_hooks'] == dict(timer=dict(type='IterTimerHook'))
    assert values['other_hooks'] == dict(mine=dict(type='MyHook'))
