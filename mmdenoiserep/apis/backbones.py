"""The backbones of a config and of a model, wherever they stand.

``backbone_configs(cfg.model)`` returns every backbone config, ``find_backbones(model)`` every backbone of a model that
was built, ``predicting_backbone(model)`` the name of the one that predictions come from. The paths differ where a model
builds one config twice: soft teacher has ``detector.backbone`` in its config, and in its model ``student.backbone`` and
``teacher.backbone``.
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
from ..core.utils.randomness import equal_draws
from ..core.utils.tensors import tensors_in
from ..engine.backbone import DenoiseRepBackbone, denoised_backbones
from .config import set_default_scope
from .errors import config_at_fault, is_from_user


def backbone_configs(model: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the config of every backbone in a model config.

    A backbone is what stands under a key ``backbone`` or ``..._backbone``, and every ``DenoiseRepBackbone``. What
    stands inside a backbone belongs to it.

    Args:
        model: The model of a config (``cfg.model``); lazy objects in it are not built.

    Returns:
        The configs by dotted path below the model, such as ``backbone`` or ``detector.backbone``: the objects of the
        config themselves, in its order.

    Raises:
        InputError: There is none.
    """
    found = dict(_configs(model, ''))
    if not found:
        raise InputError(
            'the model of the config has no backbone: no key is called backbone, and there is no DenoiseRepBackbone'
        )
    return found


def find_backbones(model: nn.Module) -> dict[str, nn.Module]:
    """Returns every backbone of a model.

    A backbone is a module called ``backbone`` or ``..._backbone``, or one that ``DenoiseRepBackbone`` built. In a model
    without any (mmpretrain's retriever has its own in a list) it is a module of a class that a library defines among
    its backbones. What stands inside a backbone belongs to it.

    Args:
        model: The model.

    Returns:
        The modules by name, such as ``backbone``, or ``student.backbone`` and ``teacher.backbone``.

    Raises:
        InputError: There is none.
    """
    denoised = {name for name, _, _ in denoised_backbones(model)}
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
    """Returns the name of the backbone that the predictions of a model come from.

    It is the only one that is no average of another (MoCo and BYOL keep such copies), or of a semi-supervised detector
    the one of ``semi_test_cfg.predict_on`` (the teacher, if that is not set).

    Args:
        model: The model; ``model.get_submodule`` takes the name.

    Raises:
        InputError: There is none, or there are several and nothing tells which is used.
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
    """Raises if a model hands its backbone something else than its images: parts of them, or others made from them.

    Args:
        model: The model. It is not checked if its ``extract_feat`` does not take images alone.
        name: Of the backbone.
        images: As the data preprocessor gives them, (B, C, H, W).

    Raises:
        InputError: See above.
    """
    extract = getattr(model, 'extract_feat', None)
    try:
        inspect.signature(extract).bind(images)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return
    seen: dict[tuple[int, ...], bool] = {}  # by shape, whether it is the images

    def note(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for x in tensors_in((args, kwargs)):
            seen[tuple(x.shape)] = seen.get(tuple(x.shape), False) or torch.equal(x, images)

    handle = model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(model), equal_draws(model):
            extract(images.clone())  # type: ignore[misc]
    except Exception as error:  # it may want other images (views of one, say)
        if is_from_user(error):
            raise
        return
    finally:
        handle.remove()
    if seen and not any(seen.values()):
        raise InputError(
            f'the model ({type(model).__name__}) hands its {name} something else than its images, {next(iter(seen))} '
            f'for {tuple(images.shape)}, which would be measured; let the data_preprocessor make what the {name} takes'
        )


def convert_backbones(cfg: Config, options: Mapping[str, Any]) -> dict[str, ConversionReport]:
    """Builds the backbones of a config with random weights and converts them.

    Args:
        cfg: A config with DenoiseRepBackbone, or one without, of which every backbone is converted.
        options: Arguments of DenoiseRepBackbone that replace those of the config.

    Returns:
        What was converted, by the place and the class of the backbone.

    Raises:
        InputError: The config has no backbone, or names what can't be built.

    Example:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> for name, report in convert_backbones(cfg, dict(targets='mlp')).items():
        ...     print(name, len(report.layers))
        mmpretrain.models.backbones.vision_transformer.VisionTransformer 8
    """
    MMLogger.get_current_instance().setLevel('ERROR')  # the conversion logs its table, which is returned here
    with config_at_fault(cfg.filename):
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
        for _, module, record in denoised_backbones(model):
            place = f'model.{path}: ' if len(models) > 1 else ''
            reports[f'{place}{type(module).__module__}.{type(module).__qualname__}'] = record.report
    return reports


def denoised_configs(config: Any) -> list[Any]:
    """Returns every ``DenoiseRepBackbone`` in a config, itself included: the objects of the config."""
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
    """Returns what a dict, a list or a tuple holds; lazy objects stay lazy."""
    if isinstance(value, Mapping):
        return dict.items(value) if isinstance(value, dict) else value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _type(config: Mapping[str, Any]) -> Any:
    return dict.get(config, 'type') if isinstance(config, dict) else config.get('type')


def _is_backbone(name: str) -> bool:
    return name == 'backbone' or name.endswith('_backbone')


def _is_denoised(kind: Any) -> bool:
    """Whether a type is DenoiseRepBackbone: the function, its name with or without a scope, or a lazy object of it."""
    return kind is DenoiseRepBackbone or str(kind).rpartition('.')[2] == DenoiseRepBackbone.__name__
