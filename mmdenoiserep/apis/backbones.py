"""Finds the backbones of a config or a model at any depth.

``backbone_configs(cfg.model)`` returns the backbone configs, ``find_backbones(model)`` the backbones of a built model,
and ``predicting_backbone(model)`` the name of the backbone that produces the predictions. Paths in config and model
differ where a model builds one config twice: SoftTeacher has ``detector.backbone`` in its config, and
``student.backbone`` and ``teacher.backbone`` in the model.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseAveragedModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..core import ConversionReport, InputError
from ..core.method.probe import evaluating
from ..core.method.record import find_records
from ..core.utils.randomness import equal_draws
from ..core.utils.tensors import tensors_in
from ..engine.backbone import DenoiseRepBackbone
from .config import set_default_scope
from .errors import config_at_fault, config_path, is_from_user


def backbone_configs(model: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the config of every backbone in a model config.

    A backbone config is the value of a key ``backbone`` or ``..._backbone``, or any ``DenoiseRepBackbone``. Configs
    inside a backbone config are part of it.

    Args:
        model: Model config (``cfg.model``); its lazy objects are not built.

    Returns:
        The configs by dotted path, such as ``backbone`` or ``detector.backbone``, in the order of the config; no
        copies.

    Raises:
        InputError: The model config has no backbone.
    """
    found = dict(_configs(model, ''))
    if not found:
        raise InputError(
            'the model of the config has no backbone: no key is called backbone, and there is no DenoiseRepBackbone'
        )
    return found


def find_backbones(model: nn.Module) -> dict[str, nn.Module]:
    """Returns every backbone of a model.

    A backbone is a module named ``backbone`` or ``..._backbone``, or built by ``DenoiseRepBackbone``. In a model
    without such a module (mmpretrain's retriever has its backbone in a list) it is a module whose class comes from
    the ``backbones`` package of a library. Modules inside a backbone are part of it.

    Args:
        model: The model.

    Returns:
        The modules by name, such as ``backbone``, or ``student.backbone`` and ``teacher.backbone``.

    Raises:
        InputError: The model has no backbone.
    """
    denoised = {name for name, _, _ in find_records(model)}
    found = _outermost(model, lambda name, _: name in denoised or _is_backbone(name.rpartition('.')[2]))
    found = found or _outermost(model, lambda _, module: '.backbones.' in type(module).__module__)
    if not found:
        kind = type(model).__name__
        raise InputError(f'the model ({kind}) has no backbone: no module in it is called backbone')
    return found


def _outermost(model: nn.Module, is_backbone: Callable[[str, nn.Module], bool]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f'{outer}.') for outer in found)
        if not inside and is_backbone(name, module):
            found[name] = module
    return found


def predicting_backbone(model: nn.Module) -> str:
    """Returns the name of the backbone that produces the predictions of a model.

    Momentum copies (MoCo, BYOL) do not count. A semi-supervised detector predicts with
    ``semi_test_cfg.predict_on``, by default the teacher.

    Args:
        model: The model.

    Returns:
        A name for ``model.get_submodule``.

    Raises:
        InputError: The model has no backbone, or several candidates.
    """
    names = list(find_backbones(model))
    if len(names) > 1 and hasattr(model, 'semi_test_cfg'):
        settings: Any = model.semi_test_cfg or {}
        part = settings.get('predict_on', 'teacher')
        names = [name for name in names if name.startswith(f'{part}.')] or names
    averages = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, BaseAveragedModel))
    names = [name for name in names if not name.startswith(averages)] or names
    if len(names) > 1:
        raise InputError(f'the model ({type(model).__name__}) has several backbones: {", ".join(names)}')
    return names[0]


def check_input(model: nn.Module, name: str, images: Tensor) -> None:
    """Checks that a model passes its images to the backbone unchanged.

    Args:
        model: The model; it is not checked if its ``extract_feat`` needs more than images.
        name: Name of the backbone in the model.
        images: Preprocessed images, (B, C, H, W).

    Raises:
        InputError: The backbone gets parts of the images, or other images made from them.
    """
    extract = getattr(model, 'extract_feat', None)
    try:
        inspect.signature(extract).bind(images)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return
    seen: dict[tuple[int, ...], bool] = {}  # by shape, whether a tensor equals the images

    def note(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for x in tensors_in((args, kwargs)):
            seen[tuple(x.shape)] = seen.get(tuple(x.shape), False) or torch.equal(x, images)

    handle = model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(model), equal_draws(model):
            extract(images.clone())  # type: ignore[misc]
    except Exception as error:  # the model may need other images, such as two views of each
        if is_from_user(error):
            raise
        return
    finally:
        handle.remove()
    if seen and not any(seen.values()):
        raise InputError(
            f'the model ({type(model).__name__}) hands its {name} something else than its images: {next(iter(seen))} '
            f'instead of {tuple(images.shape)}; let the data_preprocessor make the input of the {name}'
        )


def convert_backbones(cfg: Config, options: Mapping[str, Any]) -> dict[str, ConversionReport]:
    """Builds the backbones of a config with random weights and converts them.

    Args:
        cfg: A config with DenoiseRepBackbone; without it, every backbone is converted.
        options: Arguments of DenoiseRepBackbone, which override the config.

    Returns:
        The reports of the conversions, by place and class of the backbone.

    Raises:
        InputError: The config has no backbone, or a backbone can't be built or converted.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> for name, report in convert_backbones(cfg, dict(targets='mlp')).items():
        ...     print(name, len(report.layers))
        mmpretrain.models.backbones.vision_transformer.VisionTransformer 8
    """
    MMLogger.get_current_instance().setLevel('ERROR')  # the conversion logs the report that is returned here
    given = ', '.join(f'{key}={value!r}' for key, value in options.items())
    with config_at_fault(config_path(cfg) + f' with {given}' * bool(given)):
        set_default_scope(cfg)
        configs = deepcopy(backbone_configs(cfg.get('model') or {}))
        if not any(denoised_configs(config) for config in configs.values()):
            configs = {path: dict(type='DenoiseRepBackbone', backbone=config) for path, config in configs.items()}
        for config in configs.values():
            for denoised in denoised_configs(config):
                denoised.update(options)
        models = {path: MODELS.build(config) for path, config in configs.items() if denoised_configs(config)}
    reports = {}
    for path, model in models.items():
        for _, module, record in find_records(model):
            place = f'model.{path}: ' if len(models) > 1 else ''
            reports[f'{place}{type(module).__module__}.{type(module).__qualname__}'] = record.report
    return reports


def denoised_configs(config: Any) -> list[Any]:
    """Returns every ``DenoiseRepBackbone`` config in a config, the config itself included; no copies."""
    inner = [found for _, item in _items(config) for found in denoised_configs(item)]
    return [config, *inner] if isinstance(config, Mapping) and _is_denoised(_type(config)) else inner


def _configs(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        kind = _type(value)
        if kind is not None and (_is_backbone(path.rpartition('.')[2]) or _is_denoised(kind)):
            yield path, value
            return
    for key, item in _items(value):
        yield from _configs(item, f'{path}.{key}' if path else str(key))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Returns the items of a dict, list or tuple; lazy objects are not built."""
    if isinstance(value, Mapping):
        return dict.items(value) if isinstance(value, dict) else value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _type(config: Mapping[str, Any]) -> Any:
    return dict.get(config, 'type') if isinstance(config, dict) else config.get('type')


def _is_backbone(name: str) -> bool:
    return name == 'backbone' or name.endswith('_backbone')


def _is_denoised(kind: Any) -> bool:
    """Whether a type is DenoiseRepBackbone: the function, its name with or without scope, or its lazy object."""
    return kind is DenoiseRepBackbone or str(kind).rpartition('.')[2] == DenoiseRepBackbone.__name__
