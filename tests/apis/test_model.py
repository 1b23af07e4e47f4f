"""Weights are loaded into the whole model, or refused with what does not fit."""

import pytest
import torch
from mmengine.config import Config

from mmdenoiserep.apis.model import build_model, load_strictly, open_model, to_device
from mmdenoiserep.core import CheckpointError, InputError


def small():
    """A model with BatchNorm and a state of its own."""

    class Counting(torch.nn.Linear):
        seen = 0

        def get_extra_state(self):
            return dict(seen=self.seen)

        def set_extra_state(self, state):
            self.seen = state['seen']

    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), Counting(4, 4))


def test_all_of_a_model_is_loaded():
    trained = small()
    trained[1].running_var.uniform_(0.5, 2)
    trained[2].seen = 5
    state = trained.state_dict()
    model = small()
    load_strictly(model, {key: value for key, value in state.items() if 'tracked' not in key}, 'in.pth', 'vanilla')
    assert torch.equal(model[1].running_var, state['1.running_var']) and model[2].seen == 5
    assert torch.equal(model[2].weight, state['2.weight'])


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda key: None if 'running' in key else key, ['1.running_mean', 'BatchNorm']),
        (lambda key: f'model.{key}', ['8 tensors besides: 0.weight', 'model.0.weight']),
        (lambda key: None if key == '2.bias' else key, ['1 tensors besides: 2.bias', 'nothing besides']),
    ],
)
def test_weights_that_are_not_all_of_a_model(change, words):
    state = {change(key): value for key, value in small().state_dict().items() if change(key)}
    with pytest.raises(CheckpointError) as caught:
        load_strictly(small(), state, 'in.pth', 'vanilla')
    assert all(word in str(caught.value) for word in words)


def test_weights_of_another_shape():
    with pytest.raises(CheckpointError, match=r'2.weight is \(5, 4\) in the file and \(4, 4\) in the model'):
        load_strictly(small(), small().state_dict() | {'2.weight': torch.zeros(5, 4)}, 'in.pth', 'vanilla')


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        (
            lambda: open_model(Config({}), 'in.pth', denoisers='flod'),
            'denoisers must be one of fold, refuse, keep, got',
        ),
        (lambda: build_model('config.py'), 'cfg must be a Config, such as load_config returns, got a str'),
        (lambda: build_model(Config({})), '^the config has no model'),
        (lambda: build_model(Config(dict(model=dict(type='Nothing')))), '^the config in memory does not work'),
        (lambda: to_device(small(), 'nowhere'), '^the device nowhere cannot be used'),
    ],
)
def test_arguments_that_do_not_work(call, words):
    with pytest.raises(InputError, match=words):
        call()
