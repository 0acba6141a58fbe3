"""What our sources use of vLLM: imports, calls, and what they read on its objects. Nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.serving.contract_source import Sources, call_shape
from tests.serving.contracts import Call

COMPAT = "vllm_spense.serving.compat"


@dataclass
class Usage:
    """Keys are ``module:name``; ``reads`` and ``writes`` map an expression to attribute names."""

    imports: set[str] = field(default_factory=set)
    calls: dict[str, set[Call]] = field(default_factory=dict)
    reads: dict[str, set[str]] = field(default_factory=dict)
    writes: dict[str, set[str]] = field(default_factory=dict)


def is_vllm(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


def usage(root: Path, objects: set[str]) -> Usage:
    """Of all files of the package below ``root``; ``objects``: expressions that hold vLLM's objects."""
    sources, found = Sources.folder(root), Usage()
    for file in sorted((root / "vllm_spense").rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if (tree := sources.tree(module)) is not None:
            _scan(tree, sources, found, objects if ".serving." in module else set())
    return found


def _scan(tree: ast.Module, sources: Sources, found: Usage, objects: set[str]) -> None:
    local: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.imports |= {f"{a.name}:" for a in node.names if is_vllm(a.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and is_vllm(node.module):
            local |= {a.asname or a.name: f"{node.module}:{a.name}" for a in node.names}
    found.imports |= set(local.values()) | set(_late(tree).values())
    through_compat = _imports_of(sources.tree(COMPAT))
    local |= {f"compat.{name}": key for name, key in through_compat.items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            _scan_call(node, local, found, objects)
        elif isinstance(node, ast.Attribute) and (owner := ast.unparse(node.value)) in objects:
            store = not isinstance(node.ctx, ast.Load)
            (found.writes if store else found.reads).setdefault(owner, set()).add(node.attr)


def _imports_of(tree: ast.Module | None) -> dict[str, str]:
    """Names that users of ``compat`` get, its wrappers among them, which are named like what they wrap."""
    names: dict[str, str] = {}
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.ImportFrom) and node.module and is_vllm(node.module):
            names |= {a.name: f"{node.module}:{a.name}" for a in node.names}
    return names | (_late(tree) if tree else {})


def _late(tree: ast.Module) -> dict[str, str]:
    """Names that ``compat`` imports when they are first asked for: its table ``_LATE`` of vLLM's modules."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LATE":
            return {
                n: f"{module}:{n}" for module, names in ast.literal_eval(node.value).items() for n in names
            }
    return {}


def importers(root: Path) -> dict[str, set[str]]:
    """Modules of the package below ``root`` that import vLLM when they run, not for types, and what of it.

    By an import statement, or by a call whose first argument names it (``import_module("vllm.…")``).
    """
    found: dict[str, set[str]] = {}
    for file in sorted((root / "vllm_spense").rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        seen = set(_run_time_imports(ast.parse(file.read_text())))
        if seen:
            found[module] = seen
    return found


def _run_time_imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if is_vllm(alias.name))
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level and is_vllm(node.module):
        yield node.module
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
        if is_vllm(str(name)):
            yield str(name)
    types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for child in node.orelse if isinstance(node, ast.If) and types else ast.iter_child_nodes(node):
        yield from _run_time_imports(child)


def _scan_call(node: ast.Call, local: dict[str, str], found: Usage, objects: set[str]) -> None:
    shape = call_shape(node)
    key = local.get(ast.unparse(node.func))
    if shape and key and not shape["star"]:
        call = Call(shape["args"], tuple(shape["keywords"]))
        found.calls.setdefault(key, set()).add(call)
    constants = [str(a.value) if isinstance(a, ast.Constant) else "" for a in node.args]
    if shape and shape["receiver"] in objects and shape["name"] == "register_parameter":
        found.writes.setdefault(shape["receiver"], set()).add(constants[0])
    if shape and shape["name"] in ("getattr", "hasattr", "setattr") and len(node.args) > 1:
        owner = ast.unparse(node.args[0])
        if owner in objects and constants[1]:
            target = found.writes if shape["name"] == "setattr" else found.reads
            target.setdefault(owner, set()).add(constants[1])
