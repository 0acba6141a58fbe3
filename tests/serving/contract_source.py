"""Reads Python sources that need not be importable: signatures, bases, attributes, call sites.

vLLM wheels for CUDA cannot be imported on a machine without a GPU, but their ``.py`` files can be parsed. A
name is found where it is defined, through re-exports; classes are described with their bases.
"""

from __future__ import annotations

import ast
import inspect
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Description = dict[str, Any]


def signature_of(arguments: ast.arguments) -> inspect.Signature:
    """What ``inspect.signature`` would give, without annotations; every default is ``...``."""
    kind = inspect.Parameter
    positional = [(a, kind.POSITIONAL_ONLY) for a in arguments.posonlyargs]
    positional += [(a, kind.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    without = len(positional) - len(arguments.defaults)
    found = [
        kind(a.arg, k, default=... if i >= without else kind.empty) for i, (a, k) in enumerate(positional)
    ]
    if arguments.vararg:
        found.append(kind(arguments.vararg.arg, kind.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kind(argument.arg, kind.KEYWORD_ONLY, default=kind.empty if default is None else ...))
    if arguments.kwarg:
        found.append(kind(arguments.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(found)


def plain(signature: inspect.Signature) -> str:
    """Text of a signature, without annotations and with every default shown as ``Ellipsis``."""
    empty = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=empty, default=empty if p.default is empty else ...)
        for p in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters))


def parse_signature(text: str) -> inspect.Signature:
    """The inverse of :func:`plain`."""
    body = ast.parse(f"def f{text}: ...").body[0]
    assert isinstance(body, ast.FunctionDef)
    return signature_of(body.args)


class Sources:
    """The ``.py`` files of one tree, parsed when asked for."""

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read
        self._trees: dict[str, tuple[ast.Module, bool] | None] = {}

    @classmethod
    def folder(cls, root: Path) -> Sources:
        def read(path: str) -> str | None:
            file = root / path
            return file.read_text() if file.is_file() else None

        return cls(read)

    @classmethod
    def wheel(cls, path: Path) -> Sources:
        archive = zipfile.ZipFile(path)
        names = set(archive.namelist())
        return cls(lambda name: archive.read(name).decode() if name in names else None)

    def tree(self, module: str) -> ast.Module | None:
        return found[0] if (found := self._load(module)) else None

    def _load(self, module: str) -> tuple[ast.Module, bool] | None:
        if module not in self._trees:
            stem = module.replace(".", "/")
            self._trees[module] = None
            for path, package in ((f"{stem}/__init__.py", True), (f"{stem}.py", False)):
                if (text := self._read(path)) is not None:
                    self._trees[module] = (ast.parse(text), package)
                    break
        return self._trees[module]

    def origin(self, module: str, node: ast.ImportFrom) -> str:
        """Absolute name of the module that ``from … import`` reads."""
        if not node.level:
            return node.module or ""
        loaded = self._load(module)
        up = node.level - (1 if loaded and loaded[1] else 0)
        parent = module.split(".")[: -up or None]
        return ".".join([*parent, *([node.module] if node.module else [])])

    def find(self, module: str, name: str) -> tuple[str, ast.stmt | None] | None:
        """Module and statement that define ``name``, followed through imports; no statement: a module."""
        tree = self.tree(module)
        for node in statements(tree.body) if tree else ():
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    origin = self.origin(module, node)
                    own = (origin, alias.name) == (module, name)  # a package's submodule, in its __init__
                    if (alias.asname or alias.name) == name and not own:
                        return self.find(origin, alias.name)
            elif name in defined(node):
                return module, node
        submodule = f"{module}.{name}"
        return (submodule, None) if tree and self.tree(submodule) else None

    def resolve(self, module: str, expression: ast.expr) -> str:
        """``module:Name`` of a base class or callee written in ``module``, else its text."""
        if isinstance(expression, ast.Subscript):  # Generic[T]
            return self.resolve(module, expression.value)
        if isinstance(expression, ast.Name):
            found = self.find(module, expression.id)
        elif isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
            owner = self.find(module, expression.value.id)
            found = self.find(owner[0], expression.attr) if owner and owner[1] is None else None
        else:
            found = None
        if found is None:
            return ast.unparse(expression)
        home, node = found
        name = expression.id if isinstance(expression, ast.Name) else getattr(expression, "attr", "")
        return f"{home}:{getattr(node, 'name', name)}"

    def function(self, module: str, path: str) -> ast.FunctionDef | None:
        """A function by its path: ``name``, ``Class.method`` or ``function.inner``."""
        body: list[ast.stmt] = tree.body if (tree := self.tree(module)) else []
        node: ast.stmt | None = None
        for part in path.split("."):
            node = next((n for n in statements(body) if getattr(n, "name", None) == part), None)
            if node is None:
                return None
            body = getattr(node, "body", [])
        return node if isinstance(node, ast.FunctionDef) else None

    def describe(self, module: str, name: str) -> dict[str, Description]:
        """Descriptions of ``module:name`` and, for classes, of its bases, by key."""
        key = f"{module}:{name}"
        found = self.find(module, name)
        if found is None:
            return {}
        home, node = found
        if node is None:
            return {key: {"kind": "module"}}
        own = getattr(node, "name", name)
        result: dict[str, Description] = {}
        if f"{home}:{own}" != key:
            result[key] = {"kind": "alias", "of": f"{home}:{own}"}
        if isinstance(node, ast.ClassDef):
            bases = [self.resolve(home, base) for base in node.bases]
            result[f"{home}:{own}"] = {"kind": "class", "bases": bases, **describe_class(node)}
            for base in bases:
                if base.startswith(f"{home.partition('.')[0]}."):  # not torch's, which may lie beside vLLM
                    result |= self.describe(*base.split(":"))
        elif isinstance(node, Function):
            text = plain(signature_of(node.args))
            result[f"{home}:{own}"] = {"kind": "function", "parameters": text}
        else:
            value = getattr(node, "value", None)
            literal = {"value": value.value} if isinstance(value, ast.Constant) else {}
            result[f"{home}:{own}"] = {"kind": "value"} | literal
        return result

    def calls(self, module: str, names: set[str]) -> list[Description]:
        """Every call of ``….name(…)`` or ``name(…)``: receiver, number of arguments, keywords."""
        tree = self.tree(module)
        found = []
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.Call) and (shape := call_shape(node)) and shape["name"] in names:
                found.append(shape)
        return found

    def marks(self, module: str, path: str, patterns: tuple[str, ...]) -> list[str]:
        """Those of ``patterns`` that occur in a function's code one after the other."""
        node = self.function(module, path)
        if node is None:
            return []
        text, position, found = ast.unparse(node), 0, []
        for pattern in patterns:
            position = text.find(pattern, position)
            if position < 0:
                break
            found.append(pattern)
            position += len(pattern)
        return found


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, with those under ``if``, ``try`` and ``with``."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


def defined(node: ast.stmt) -> set[str]:
    """Names that a statement defines in its own scope (imports excepted)."""
    if isinstance(node, (*Function, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def self_attributes(node: ast.AST) -> set[str]:
    """Attributes assigned on ``self`` anywhere below ``node``."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
    }


def describe_class(node: ast.ClassDef) -> Description:
    """Methods with their signatures, and the attributes that the class or its methods assign."""
    methods: dict[str, Description] = {}
    attributes = self_attributes(node)
    for item in statements(node.body):
        if not isinstance(item, Function):
            attributes |= defined(item)
        elif item.name not in methods:  # the first of a property's getter and setter
            marks = {ast.unparse(d).split("(")[0].rpartition(".")[2] for d in item.decorator_list}
            kinds = {"property", "cached_property", "staticmethod", "classmethod"} & marks
            description: Description = {"parameters": plain(signature_of(item.args))}
            description["kind"] = min(kinds, default="method").removeprefix("cached_")
            if "abstractmethod" in marks:
                description["abstract"] = True
            methods[item.name] = description
    return {"methods": methods, "attributes": sorted(attributes)}


def call_shape(node: ast.Call) -> Description | None:
    """Name, receiver and argument shape of a call, if it calls a name or an attribute."""
    if isinstance(node.func, ast.Attribute):
        name, receiver = node.func.attr, ast.unparse(node.func.value)
    elif isinstance(node.func, ast.Name):
        name, receiver = node.func.id, ""
    else:
        return None
    star = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
    keywords = sorted(k.arg for k in node.keywords if k.arg)
    args = sum(not isinstance(a, ast.Starred) for a in node.args)
    return {"name": name, "receiver": receiver, "args": args, "keywords": keywords, "star": star}
