"""Runs that go on side by side in one thread."""

import contextvars

import pytest
import torch

from mmdenoiserep.core.utils.lockstep import Lockstep

MARK = contextvars.ContextVar('mark', default='outside')


def modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu')


def test_all_runs_pass_a_place_before_one_goes_on():
    seen = []
    with Lockstep() as steps:

        def run(number, places):
            for place in places:
                seen.append((number, place))
                steps.pause(place)
            seen.append((number, 'end'))

        for number, places in enumerate(['ab', 'b', 'ab']):
            steps.start(lambda number=number, places=places: run(number, places))
        assert steps.places == ['a', 'b', 'a']
        steps.resume('a')
        assert steps.places == ['b', 'b', 'b']
        steps.resume('a')
        steps.resume('b')
        assert steps.places == []
    assert seen == [(0, 'a'), (1, 'b'), (2, 'a'), (0, 'b'), (2, 'b'), (1, 'end'), (0, 'end'), (2, 'end')]


@pytest.mark.parametrize('outside', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_modes_of_the_thread_belong_to_the_run(outside):
    inside = [torch.inference_mode, torch.no_grad, torch.enable_grad, lambda: torch.autocast('cpu', torch.bfloat16)]
    with outside(), Lockstep() as steps:

        def run(make, number):
            MARK.set(number)
            with make():
                before = modes()
                for place in range(3):
                    steps.pause(place)
                    assert modes() == before and MARK.get() == number
            assert modes() == here

        here = modes()
        for number, make in enumerate(inside):
            steps.start(lambda make=make, number=number: run(make, number))
            assert modes() == here
        for place in range(3):
            steps.resume(place)
            assert modes() == here and MARK.get() == 'outside'
        assert not steps.places


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize('in_run', [True, False])
def test_an_error_ends_all_runs(error, in_run):
    """Each from inside, one that catches everything too, and all modes are those of before."""
    ended, here = [], modes()

    def run(number):
        try:
            with torch.inference_mode():
                try:
                    steps.pause('a')
                    if in_run and number == 1:
                        raise error
                except BaseException:
                    if number != 2:
                        raise
                steps.pause('b')
        finally:
            ended.append(number)

    with pytest.raises(error), Lockstep() as steps:
        for number in range(4):
            steps.start(lambda number=number: run(number))
        if in_run:
            steps.resume('a')
        raise error
    assert sorted(ended) == [0, 1, 2, 3] and not steps.places and modes() == here


def test_a_run_that_fails_while_it_is_ended_leaves_no_other_behind():
    ended = []

    def run(number):
        try:
            steps.pause('a')
        finally:
            ended.append(number)
            if number == 1:
                raise ValueError('while it is ended')

    with pytest.raises(ValueError, match='while it is ended'), Lockstep() as steps:
        for number in range(3):
            steps.start(lambda number=number: run(number))
    assert sorted(ended) == [0, 1, 2]
