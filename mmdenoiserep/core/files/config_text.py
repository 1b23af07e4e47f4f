"""Removes denoising from the text of a config, without executing it."""

import ast

PACKAGE = 'mmdenoiserep'
HOOKS = ('DenoiseLossHook', 'DenoiseFusionHook', 'DenoiseVisHook')
REGISTERED = ('VMamba',)
"""Classes that the package registers and that a config without denoising may use."""


def vanilla_text(text: str) -> str:
    """Returns the text of a config without denoising.

    Replaces every ``DenoiseRepBackbone`` by its inner backbone. Drops the hooks of this package, the settings of
    ``.denoiser.`` parameters, and the import of this package unless the config needs it for something else.

    Args:
        text: The Python file that mmengine writes into ``meta['cfg']``.

    Returns:
        The text; unchanged statements keep their formatting.

    Raises:
        ValueError: The text mentions denoising and is no Python file.
    """
    if 'denoise' not in text.lower():
        return text
    try:
        module = ast.parse(text)
        old = [ast.get_source_segment(text, statement) or '' for statement in module.body]
        before = [ast.dump(statement) for statement in module.body]
        _Vanilla().visit(module)
        if not _needs_package(module):
            _drop_import(module)
        if [ast.dump(statement) for statement in module.body] == before:
            return text
        new = []
        for statement in module.body:
            dump = ast.dump(statement)
            new.append(old[before.index(dump)] if dump in before else ast.unparse(statement))
        return '\n'.join(new) + '\n'
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f'it is no Python file: {error}') from None


def _needs_package(module: ast.Module) -> bool:
    values = [node.value for node in ast.walk(module) if isinstance(node, ast.Constant)]
    names = {value.rpartition('.')[2] for value in values if isinstance(value, str)}
    return not names.isdisjoint({'DenoiseRepBackbone', *HOOKS, *REGISTERED})


def _drop_import(module: ast.Module) -> None:
    """Drops this package from ``custom_imports``, which is removed if nothing else is left in it."""
    for statement in list(module.body):
        if not isinstance(statement, ast.Assign) or ast.unparse(statement.targets[0]) != 'custom_imports':
            continue
        imports = _fields(statement.value).get('imports')
        listed = imports.elts if isinstance(imports, ast.List | ast.Tuple) else [imports]
        kept = [item for item in listed if item and not (isinstance(item, ast.Constant) and item.value == PACKAGE)]
        if isinstance(imports, ast.List | ast.Tuple) and kept:
            imports.elts = kept
        elif len(kept) < len(listed):
            module.body.remove(statement)


class _Vanilla(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replaces ``dict(type='DenoiseRepBackbone', backbone=...)``; drops the hooks in ``default_hooks``."""
        self.generic_visit(node)
        node.keywords = [keyword for keyword in node.keywords if _type_name(keyword.value) not in HOOKS]
        return self._unwrap(node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        """Does the same for ``{...}``, and drops the key ``'.denoiser.'``."""
        self.generic_visit(node)
        items = [
            (key, value)
            for key, value in zip(node.keys, node.values, strict=True)
            if not (isinstance(key, ast.Constant) and key.value == '.denoiser.') and _type_name(value) not in HOOKS
        ]
        node.keys, node.values = [key for key, _ in items], [value for _, value in items]
        return self._unwrap(node)

    def visit_List(self, node: ast.List | ast.Tuple) -> ast.AST:
        """Drops the hooks."""
        self.generic_visit(node)
        node.elts = [item for item in node.elts if _type_name(item) not in HOOKS]
        return node

    visit_Tuple = visit_List

    @staticmethod
    def _unwrap(node: ast.Call | ast.Dict) -> ast.AST:
        fields = _fields(node)
        if _type_name(node) != 'DenoiseRepBackbone' or 'backbone' not in fields:
            return node
        inner, pretrained = fields['backbone'], fields.get('pretrained')
        if pretrained is None or (isinstance(pretrained, ast.Constant) and pretrained.value is None):
            return inner
        return ast.Call(
            func=ast.Name('dict', ast.Load()),
            args=[inner],
            keywords=[ast.keyword('pretrained', pretrained)],
        )


def _fields(node: ast.AST) -> dict[str, ast.expr]:
    """Returns the items of ``dict(a=1)``, ``{'a': 1}`` or ``dict({'a': 1})``."""
    fields = {}
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                fields[key.value] = value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        for argument in node.args:
            fields.update(_fields(argument))
        fields.update({keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})
    return fields


def _type_name(node: ast.AST) -> str | None:
    """Returns the name of the class in ``type``, without its module (lazy configs give the full name)."""
    kind = _fields(node).get('type')
    return kind.value.rpartition('.')[2] if isinstance(kind, ast.Constant) and isinstance(kind.value, str) else None
