"""Compares the contract with facts about one vLLM: a snapshot of a wheel, or the installed version.

A problem is one line: the entry, what is wrong with it, why we need it. No problem: an empty list.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.serving.contract_snapshot import Facts, facts
from tests.serving.contract_source import Sources, parse_signature, plain, self_attributes, signature_of
from tests.serving.contracts import CALLED, MARKS, OVERRIDES, USES, Call, Called, Marks, Overrides, Uses

OWN = Sources.folder(Path(__file__).parents[2])


def installed() -> Sources:
    """Sources of the vLLM that can be imported here (nothing is imported)."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Sources.folder(Path(spec.origin).parents[1])


def live_facts() -> Facts:
    """Facts about the installed version: names by import and ``inspect``, call sites and marks by ``ast``."""
    names: dict[str, Any] = {}
    for key in sorted({u.key for u in USES} | {o.base for o in OVERRIDES}):
        module, name = key.split(":")
        try:
            names |= live_description(key, getattr(import_module(module), name))
        except ImportError:
            continue
        except AttributeError:
            if find_spec(f"{module}.{name}"):  # a program, not imported by its package
                names[key] = {"kind": "module"}
    return facts(installed()) | {"names": names}


def live_description(key: str, found: Any) -> dict[str, Any]:
    """What :meth:`Sources.describe` says of a name, by ``inspect``."""
    if inspect.isclass(found):
        result: dict[str, Any] = {}
        for cls in inspect.getmro(found):
            if cls.__module__.partition(".")[0] == found.__module__.partition(".")[0]:
                result[f"{cls.__module__}:{cls.__qualname__}"] = _live_class(cls)
        home = f"{found.__module__}:{found.__qualname__}"
        return result if home == key else {key: {"kind": "alias", "of": home}} | result
    if inspect.isfunction(found):
        home = f"{found.__module__}:{found.__qualname__}"
        result = {home: {"kind": "function", "parameters": plain(inspect.signature(found))}}
        return result if home == key else {key: {"kind": "alias", "of": home}} | result
    literal = {"value": found} if isinstance(found, (str, int, float)) else {}
    return {key: {"kind": "value"} | literal}


def _live_class(cls: type) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    attributes = set(getattr(cls, "__annotations__", ()))
    attributes |= self_attributes(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    for name, member in vars(cls).items():
        special = isinstance(member, (staticmethod, classmethod, property)) and name != "__new__"
        kind = type(member).__name__ if special else "method"
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not inspect.isfunction(function):
            attributes.add(name)
            continue
        methods[name] = {"parameters": plain(inspect.signature(function)), "kind": kind}
        if getattr(function, "__isabstractmethod__", False):
            methods[name]["abstract"] = True
    bases = [f"{base.__module__}:{base.__qualname__}" for base in cls.__bases__]
    return {"kind": "class", "bases": bases, "methods": methods, "attributes": sorted(attributes)}


def problems(
    found: Facts,
    uses: tuple[Uses, ...] = USES,
    overrides: tuple[Overrides, ...] = OVERRIDES,
    called: tuple[Called, ...] = CALLED,
    marks: tuple[Marks, ...] = MARKS,
    own: Sources = OWN,
) -> list[str]:
    """What the facts lack; ``own`` holds our classes and functions."""
    names = found["names"]
    lines = [f"{use.key}: {text} ({use.why})" for use in uses for text in _use(names, use)]
    lines += [f"{o.ours}: {text}" for o in overrides for text in _override(names, o, own)]
    lines += [f"{c.ours[0]}: {text} ({c.why})" for c in called for text in _called(found, c, own)]
    for mark in marks:
        key = f"{mark.module}:{mark.function}"
        there = found["marks"].get(key, [])
        if tuple(there) != mark.patterns:
            lines.append(f"{key}: no {mark.patterns[len(there)]!r} where we rely on it ({mark.why})")
    return lines


def lookup(names: dict[str, Any], key: str) -> dict[str, Any] | None:
    entry = names.get(key)
    return names.get(entry["of"]) if entry and entry["kind"] == "alias" else entry


def ancestors(names: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A class and its known bases, nearest first."""
    entry = lookup(names, key)
    return [] if entry is None else [entry] + [a for b in entry.get("bases", ()) for a in ancestors(names, b)]


def member(classes: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The method that instances have; ``{}`` for an attribute that is no method."""
    for cls in classes:
        if name in cls["methods"]:
            return cls["methods"][name]
        if name in cls["attributes"]:
            return {}
    return None


def bound(method: dict[str, Any]) -> inspect.Signature:
    """Signature as callers of an instance see it."""
    signature = parse_signature(method["parameters"])
    if method["kind"] == "staticmethod":
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def misfit(signature: inspect.Signature, args: int, keywords: tuple[str, ...] | list[str]) -> str | None:
    """Why a call does not bind to a signature."""
    try:
        signature.bind(*[None] * args, **dict.fromkeys(keywords))
    except TypeError as error:
        return f"{signature} refuses {args} arguments and keywords {list(keywords)}: {error}"
    return None


def _use(names: dict[str, Any], use: Uses) -> list[str]:
    entry = lookup(names, use.key)
    if entry is None:
        return ["is gone"]
    if entry["kind"] != use.kind:
        return [f"is a {entry['kind']}, not a {use.kind}"]
    lines = []
    if use.value is not None and entry.get("value") != use.value:
        lines.append(f"is {entry.get('value')!r}, not {use.value!r}")
    classes = ancestors(names, use.key) if use.kind == "class" else []
    lines += [f"has no attribute {name}" for name in use.attributes if member(classes, name) is None]
    constructors = [member(classes, name) for name in ("__new__", "__init__")]
    targets: list[tuple[str, inspect.Signature, Call]]
    targets = [("", bound(method), call) for method in constructors if method for call in use.calls]
    if use.kind == "function":
        targets = [("", parse_signature(entry["parameters"]), call) for call in use.calls]
    for name, call in use.methods:
        if method := member(classes, name):
            targets.append((f"{name} ", bound(method), call))
        else:
            lines.append(f"has no method {name}")
    reasons = [(name, misfit(signature, call.args, call.keywords)) for name, signature, call in targets]
    return lines + [f"{name}{reason}" for name, reason in reasons if reason]


def _override(names: dict[str, Any], override: Overrides, own: Sources) -> list[str]:
    base = ancestors(names, override.base)
    if not base:
        return [f"its base class {override.base} is gone"]
    described = own.describe(*override.ours.split(":"))
    ours = [c for key, c in described.items() if key.startswith(override.ours.partition(".")[0] + ".")]
    lines = []
    for name in override.members:
        theirs, mine = member(base, name), member(ours, name)
        if theirs is None:
            lines.append(f"vLLM's base class has no {name} any more, so ours is never called")
        elif mine is None:
            lines.append(f"has no {name} of its own")
        elif theirs and mine:
            lines += [f"{name}{text}" for text in _accepts(bound(mine), bound(theirs))]
    required = {name for cls in base for name, method in cls["methods"].items() if method.get("abstract")}
    open_ones = {n for n in required if (m := member(base, n)) and m.get("abstract")}
    lines += [f"the abstract {n} is not there" for n in sorted(open_ones) if member(ours, n) is None]
    return lines


def _accepts(mine: inspect.Signature, theirs: inspect.Signature) -> list[str]:
    """Why ``mine`` cannot stand in for ``theirs``, by position and by keyword."""
    kinds = inspect.Parameter
    plain_ones = [p for p in theirs.parameters.values() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in theirs.parameters.values() if p.kind is kinds.KEYWORD_ONLY]
    reasons = [misfit(mine, len(plain_ones), named), misfit(mine, 0, [p.name for p in plain_ones] + named)]
    return [reason for reason in reasons if reason]


def _called(found: Facts, entry: Called, own: Sources) -> list[str]:
    sites = [s for m in entry.modules for s in found["calls"].get(m, ())]
    sites = [s for s in sites if s["name"] == entry.name and s["receiver"] in entry.receivers]
    if not sites:
        return [f"no call of {entry.name} in {', '.join(entry.modules)}"]
    lines = []
    for ours in entry.ours:
        signature = own_signature(own, ours)
        if signature is None:
            lines.append(f"{ours} is not in our sources")
            continue
        for site in sites:
            reason = None if site["star"] else misfit(signature, site["args"], site["keywords"])
            lines += [f"vLLM's call does not bind: {ours}{reason}"] if reason else []
    return list(dict.fromkeys(lines))


def own_signature(own: Sources, ours: str) -> inspect.Signature | None:
    """Signature of one of our functions (``module:function.inner``) or methods (``module:Class.method``)."""
    module, path = ours.split(":")
    if (node := own.function(module, path)) is not None and not path[0].isupper():
        return signature_of(node.args)
    cls, _, name = path.partition(".")
    described = own.describe(module, cls)
    prefix = module.partition(".")[0] + "."
    method = member([c for key, c in described.items() if key.startswith(prefix)], name) if name else None
    return bound(method) if method else None
