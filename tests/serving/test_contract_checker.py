"""The contract's checker must notice: every entry is broken once, and a made-up module is read as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.contract_check import OWN, ancestors, lookup, member, parse_signature, problems
from tests.serving.contract_snapshot import SNAPSHOTS, facts, save
from tests.serving.contract_source import Sources, plain
from tests.serving.contract_usage import importers, usage
from tests.serving.contracts import CALLED, MARKS, OVERRIDES, USES, Call, Called, Marks, Overrides, Uses

Facts = dict[str, Any]
SNAPSHOT = json.loads(max(SNAPSHOTS.iterdir()).read_text())


def broken(change: Callable[[Facts], object]) -> list[str]:
    """Problems of a snapshot after one change."""
    found = copy.deepcopy(SNAPSHOT)
    change(found)
    return problems(found)


def rename(names: dict[str, Any], key: str, name: str) -> None:
    """One member of a class, wherever in its bases it is defined, gets another name."""
    for cls in ancestors(names, key):
        cls["attributes"] = [f"{a}_" if a == name else a for a in cls["attributes"]]
        cls["methods"] = {f"{m}_" if m == name else m: text for m, text in cls["methods"].items()}


@pytest.mark.parametrize("use", USES, ids=lambda use: use.key)
def test_a_name_that_moved_is_noticed(use: Uses) -> None:
    lines = broken(lambda found: found["names"].pop(use.key))
    assert f"{use.key}: is gone ({use.why})" in lines


@pytest.mark.parametrize("use", USES, ids=lambda use: use.key)
def test_a_name_of_another_kind_is_noticed(use: Uses) -> None:
    lines = broken(lambda found: lookup(found["names"], use.key).update(kind="surprise"))  # type: ignore[union-attr]
    assert f"{use.key}: is a surprise, not a {use.kind} ({use.why})" in lines


MEMBERS = [(u.key, a, "attribute") for u in USES for a in u.attributes]
MEMBERS += [(u.key, m, "method") for u in USES for m, _ in u.methods]


@pytest.mark.parametrize(("key", "name", "kind"), MEMBERS)
def test_a_renamed_member_is_noticed(key: str, name: str, kind: str) -> None:
    lines = broken(lambda found: rename(found["names"], key, name))
    assert [line for line in lines if line.startswith(f"{key}: has no {kind} {name} (")]


CALLS = [(u.key, name, call) for u in USES for name, call in u.methods]
CALLS += [(u.key, "", call) for u in USES for call in u.calls]


@pytest.mark.parametrize(("key", "name", "call"), CALLS)
def test_a_new_required_parameter_is_noticed(key: str, name: str, call: Call) -> None:
    def change(found: Facts) -> None:
        entry = lookup(found["names"], key)
        assert entry is not None
        target = entry
        if entry["kind"] == "class":
            target = member(ancestors(found["names"], key), name or "__init__") or {"parameters": "(self)"}
            if not name and member([entry], "__init__") is None:
                entry["methods"]["__init__"] = target = {"parameters": "(self)", "kind": "method"}
        head = target["parameters"].removesuffix(")")
        star = "" if "*, " in head else "*, "
        target["parameters"] = f"{head}{', ' if head != '(' else ''}{star}surprise)".replace(
            "**kwargs, *,", "*,"
        )

    lines = broken(change)
    assert [line for line in lines if line.startswith(f"{key}: ") and "'surprise'" in line], lines


OVERRIDDEN = [(o, name) for o in OVERRIDES for name in o.members]


@pytest.mark.parametrize(("override", "name"), OVERRIDDEN, ids=lambda value: getattr(value, "ours", value))
def test_a_hook_that_vllm_dropped_is_noticed(override: Overrides, name: str) -> None:
    lines = broken(lambda found: rename(found["names"], override.base, name))
    assert f"{override.ours}: vLLM's base class has no {name} any more, so ours is never called" in lines


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override.ours)
def test_a_new_abstract_method_is_noticed(override: Overrides) -> None:
    def change(found: Facts) -> None:
        method = {"parameters": "(self)", "kind": "method", "abstract": True}
        found["names"][override.base]["methods"]["surprise"] = method

    assert f"{override.ours}: the abstract surprise is not there" in broken(change)


@pytest.mark.parametrize("name", ["get_quant_method", "apply_vllm_mapper", "from_config"])
def test_a_hook_with_a_new_parameter_is_noticed(name: str) -> None:
    def change(found: Facts) -> None:
        method = found["names"][OVERRIDES[0].base]["methods"][name]
        method["parameters"] = method["parameters"].replace(")", ", surprise)")

    lines = [line for line in broken(change) if line.startswith(f"{OVERRIDES[0].ours}: {name}")]
    assert len(lines) == 2, "by position and by keyword"


@pytest.mark.parametrize("entry", CALLED, ids=lambda entry: entry.ours[0])
def test_a_call_that_vllm_changed_is_noticed(entry: Called) -> None:
    def drop(found: Facts) -> None:
        for module in entry.modules:
            found["calls"][module] = [s for s in found["calls"][module] if s["name"] != entry.name]

    def extend(found: Facts) -> None:
        for module in entry.modules:
            for site in found["calls"][module]:
                site["args"] += 9

    assert f"{entry.ours[0]}: no call of {entry.name} in {', '.join(entry.modules)} ({entry.why})" in broken(
        drop
    )
    lines = broken(extend)
    for ours in entry.ours:
        assert [x for x in lines if f"vLLM's call does not bind: {ours}(" in x and "refuses" in x], ours


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: f"{mark.module}:{mark.function}")
def test_code_that_vllm_dropped_is_noticed(mark: Marks) -> None:
    key = f"{mark.module}:{mark.function}"
    for count, pattern in enumerate(mark.patterns):
        lines = broken(lambda found, count=count: found["marks"].update({key: list(mark.patterns[:count])}))
        assert f"{key}: no {pattern!r} where we rely on it ({mark.why})" in lines


TREE = {
    "vllm/__init__.py": "",
    "vllm/api.py": "from .parts.base import Base as Renamed\nfrom vllm import parts\nGROUP = 'a.b'\n",
    "vllm/parts/__init__.py": "from .base import make",
    "vllm/parts/base.py": """
import abc
from vllm.parts.root import Root
if True:
    class Base(Root, abc.ABC):
        limit: int
        names, other = [], 1
        def __init__(self, a, /, b, *rest, c, d=1, **more):
            self.first, self.second = a, b
        @property
        def size(self): return 1
        @size.setter
        def size(self, value): self.sized = value
        @staticmethod
        def free(x): ...
        @classmethod
        @abc.abstractmethod
        def hook(cls, x): ...
try:
    def make(quant, *, key=None): return quant.hook(1, *[2], name=quant)
except ImportError:
    pass
""",
    "vllm/parts/root.py": "class Root:\n    async def run(self): self.deep = 1\n",
}


@pytest.fixture
def tree() -> Sources:
    return Sources(TREE.get)


def test_names_are_found_through_reexports(tree: Sources) -> None:
    described = tree.describe("vllm.api", "Renamed")
    assert described["vllm.api:Renamed"] == {"kind": "alias", "of": "vllm.parts.base:Base"}
    assert described["vllm.parts.base:Base"]["bases"] == ["vllm.parts.root:Root", "abc.ABC"]
    assert set(described) == {"vllm.api:Renamed", "vllm.parts.base:Base", "vllm.parts.root:Root"}
    assert tree.describe("vllm.api", "GROUP") == {"vllm.api:GROUP": {"kind": "value", "value": "a.b"}}
    assert tree.describe("vllm.api", "parts") == {"vllm.api:parts": {"kind": "module"}}
    made = {"kind": "function", "parameters": "(quant, *, key=Ellipsis)"}
    assert tree.describe("vllm.parts", "make")["vllm.parts.base:make"] == made
    assert tree.describe("vllm.api", "Base") == {}
    assert tree.describe("vllm.absent", "Base") == {}


def test_a_class_is_described_as_it_is(tree: Sources) -> None:
    found = tree.describe("vllm.parts.base", "Base")
    base = found["vllm.parts.base:Base"]
    assert base["attributes"] == ["first", "limit", "names", "other", "second", "sized"]
    assert base["methods"] == {
        "__init__": {"parameters": "(self, a, /, b, *rest, c, d=Ellipsis, **more)", "kind": "method"},
        "size": {"parameters": "(self)", "kind": "property"},
        "free": {"parameters": "(x)", "kind": "staticmethod"},
        "hook": {"parameters": "(cls, x)", "kind": "classmethod", "abstract": True},
    }
    assert found["vllm.parts.root:Root"]["attributes"] == ["deep"]
    for method in base["methods"].values():
        assert plain(parse_signature(method["parameters"])) == method["parameters"]


def test_call_sites_and_marks_are_read(tree: Sources) -> None:
    shape = {"name": "hook", "receiver": "quant", "args": 1, "keywords": ["name"], "star": True}
    assert tree.calls("vllm.parts.base", {"hook"}) == [shape]
    assert tree.calls("vllm.parts.base", {"other"}) == []
    assert tree.marks("vllm.parts.base", "make", ("return", "hook(", "absent", "name")) == ["return", "hook("]
    assert tree.marks("vllm.parts.base", "Base.__init__", ("self.second", "self.first")) == ["self.second"]
    assert tree.marks("vllm.parts.base", "Base.gone", ("self",)) == []


def test_a_changed_source_breaks_its_contract() -> None:
    """The whole way, from source text to the message, as a refresh for a new version would go."""
    contract = (
        (Uses("vllm.parts:make", "function", "test", calls=(Call(1, ("key",)),)),),
        (Overrides("own.hooks:Ours", "vllm.api:Renamed", ("hook",)),),
        (Called(("own.hooks:Ours.hook",), "hook", ("quant",), ("vllm.parts.base",), "test"),),
        (Marks("vllm.parts.base", "make", ("quant.hook(",), "test"),),
    )
    own = Sources(
        {"own/hooks.py": "from vllm.api import Renamed\nclass Ours(Renamed):\n    def hook(self, x): ..."}.get
    )

    def check(old: str = "", new: str = "") -> list[str]:
        base = TREE["vllm/parts/base.py"]
        assert old in base
        changed = Sources((TREE | {"vllm/parts/base.py": base.replace(old, new) if old else base}).get)
        return problems(facts(changed, *contract), *contract, own=own)

    assert check() == []
    assert check("key=None", "tag=None") == [
        "vllm.parts:make: (quant, *, tag=Ellipsis) refuses 1 arguments and keywords ['key']: "
        "got an unexpected keyword argument 'key' (test)"
    ]
    assert check("def make(", "def build(") == [
        "vllm.parts:make: is gone (test)",
        "vllm.parts.base:make: no 'quant.hook(' where we rely on it (test)",
    ]
    assert check("def hook(cls, x)", "def hook(cls, x, *, mode)") == [
        f"own.hooks:Ours: hook(x) refuses {count}: got an unexpected keyword argument 'mode'"
        for count in ("1 arguments and keywords ['mode']", "0 arguments and keywords ['x', 'mode']")
    ]
    assert check("hook(1, *[2], name=quant)", "hook(1, name=quant)") == [
        "own.hooks:Ours.hook: vLLM's call does not bind: own.hooks:Ours.hook(x) refuses 1 arguments and "
        "keywords ['name']: got an unexpected keyword argument 'name' (test)"
    ]


def test_a_use_without_an_entry_is_seen(tmp_path: Path) -> None:
    serving = tmp_path / "vllm_spense" / "serving"
    serving.mkdir(parents=True)
    (serving / "compat.py").write_text("from vllm.a import wrapped\nimport vllm.b\n")
    (serving / "more.py").write_text(
        "from vllm_spense.serving import compat\n"
        "def f(layer):\n"
        "    from vllm.c import late as soon\n"
        "    soon(1, x=2); compat.wrapped(y=layer.rank)\n"
        "    layer.mine = getattr(layer, 'size', layer.mine); layer.register_parameter('weight', None)\n"
    )
    found = usage(tmp_path, {"layer"})
    assert found.imports == {"vllm.a:wrapped", "vllm.b:", "vllm.c:late"}
    assert found.calls == {"vllm.c:late": {Call(1, ("x",))}, "vllm.a:wrapped": {Call(0, ("y",))}}
    assert found.reads == {"layer": {"rank", "size", "mine", "register_parameter"}}
    assert found.writes == {"layer": {"mine", "weight"}}


def test_names_that_compat_imports_late_are_seen(tmp_path: Path) -> None:
    serving = tmp_path / "vllm_spense" / "serving"
    serving.mkdir(parents=True)
    (serving / "compat.py").write_text("_LATE = {'vllm.a': ('first', 'second')}\n")
    (serving / "more.py").write_text("from vllm_spense.serving import compat\ncompat.second(1)\n")
    found = usage(tmp_path, set())
    assert found.imports == {"vllm.a:first", "vllm.a:second"}
    assert found.calls == {"vllm.a:second": {Call(1)}}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("import vllm.a", {"vllm.a"}),
        ("def f():\n    from vllm.b import c", {"vllm.b"}),
        ("from importlib import import_module\nimport_module('vllm.d')", {"vllm.d"}),
        ("if TYPE_CHECKING:\n    from vllm.e import f\nelse:\n    import vllm.g", {"vllm.g"}),
        ("import vllm_spense.serving\nimport_module('vllm_spense.ops')", None),
    ],
)
def test_who_imports_vllm_is_seen(text: str, seen: set[str] | None, tmp_path: Path) -> None:
    (tmp_path / "vllm_spense").mkdir()
    (tmp_path / "vllm_spense" / "some.py").write_text(text)
    assert importers(tmp_path) == ({} if seen is None else {"vllm_spense.some": seen})


def test_a_snapshot_survives_the_disk(tmp_path: Path) -> None:
    path = save(SNAPSHOT, tmp_path)
    assert json.loads(path.read_text()) == SNAPSHOT
    assert path.read_text() == (SNAPSHOTS / path.name).read_text()


def test_our_own_functions_are_found() -> None:
    described = OWN.describe("vllm_spense.serving.layers.online", "SpenseOnlineLinearMethod")
    assert "vllm_spense.serving.layers.online:SpenseOnlineLinearMethod" in described
    assert "vllm.model_executor.layers.linear:LinearMethodBase" not in described
    assert OWN.function("vllm_spense.serving.loading", "make_loader.spense_weight_loader") is not None
