"""``register()`` never takes a foreign model down: whatever vLLM has become, and whoever else is loaded."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_spense.serving import plugin

FOREIGN = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """vLLM's lists as if nobody had registered; the value collects what the plugin logs."""
    from vllm.model_executor.layers import quantization

    custom = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    without = [m for m in quantization.QUANTIZATION_METHODS if m not in plugin.METHODS]
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", without)
    for method in plugin.METHODS:
        monkeypatch.delitem(custom, method, raising=False)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "failure", None)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    plugin.logger.addHandler(handler)
    yield messages
    plugin.logger.removeHandler(handler)


def foreign_model_is_detected() -> None:
    """What vLLM does for every quantized model: it asks each listed method whether it wants it."""
    from vllm.model_executor.layers import quantization

    for name in quantization.QUANTIZATION_METHODS:
        method = quantization.get_quantization_config(name)
        wanted = method.override_quantization_method(FOREIGN, None, hf_config=None)
        assert wanted is None or name != plugin.METHOD


def gone(patch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import quantization

    patch.delattr(quantization, "register_quantization_config")


def moved(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)


def own_import(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "vllm_spense.serving.config", None)


def own_name(patch: pytest.MonkeyPatch) -> None:
    import vllm_spense.serving.config as config

    patch.delattr(config, "SpenseConfig")


def replaced(function: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.model_executor.layers import quantization

        monkeypatch.setattr(quantization, "register_quantization_config", function)

    return patch


def attribute_error(name: str) -> None:
    raise AttributeError("moved in the next version")


def two_arguments(name: str, group: str) -> None: ...


def no_decorator(name: str) -> None: ...


def another_base(patch: pytest.MonkeyPatch) -> None:
    """vLLM lists the name first and refuses the class then."""
    import vllm_spense.serving.config as config

    patch.setattr(config, "SpenseConfig", type("SpenseConfig", (), {}))


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (gone, "ImportError: cannot import name 'register_quantization_config'"),
        (moved, "ModuleNotFoundError: import of vllm.model_executor.layers.quantization halted"),
        (own_import, "ModuleNotFoundError: import of vllm_spense.serving.config halted"),
        (own_name, "ImportError: cannot import name 'SpenseConfig'"),
        (replaced(attribute_error), "AttributeError: moved in the next version"),
        (replaced(two_arguments), "TypeError: two_arguments() missing 1 required positional argument"),
        (replaced(no_decorator), "TypeError: 'NoneType' object is not callable"),
        (another_base, "ValueError: The quantization config must be a subclass of `QuantizationConfig`."),
    ],
)
def test_a_vllm_that_changed(
    change: Callable[[pytest.MonkeyPatch], None], failure: str, fresh: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        plugin.register()
    assert plugin._registered is False
    assert plugin.failure is not None
    assert plugin.failure.startswith(failure)
    (message,) = fresh
    assert "could not register with this vLLM" in message
    assert "spense doctor" in message
    foreign_model_is_detected()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    assert not set(plugin.METHODS) & set(QUANTIZATION_METHODS)


def test_a_failure_is_not_for_ever(fresh: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        own_import(patch)
        plugin.register()
    plugin.register()
    assert (plugin._registered, plugin.failure, len(fresh)) == (True, None, 1)
    foreign_model_is_detected()


def test_registering_twice(fresh: list[str]) -> None:
    from vllm.model_executor.layers import quantization

    from vllm_spense.serving.config import SpenseConfig

    plugin.register()
    plugin.register()
    assert quantization.QUANTIZATION_METHODS.count("spense") == 1
    assert quantization.get_quantization_config("spense") is SpenseConfig
    assert fresh == []
    foreign_model_is_detected()


def test_models_that_vllm_lacks(fresh: list[str]) -> None:
    """Architectures, config classes and the second method; what vLLM and transformers know is not touched."""
    from transformers import AutoConfig
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.models import ModelRegistry

    from vllm_spense.models.families import ACTIVATION_SPARSE
    from vllm_spense.serving.models.configs import CONFIGS
    from vllm_spense.serving.twell import TwellConfig

    before = {name: model for name, model in ModelRegistry.models.items() if name not in ACTIVATION_SPARSE}
    plugin.register()
    assert {n: m for n, m in ModelRegistry.models.items() if n not in ACTIVATION_SPARSE} == before
    for name in ACTIVATION_SPARSE:
        model = ModelRegistry.models[name]
        assert f"{model.module_name}:{model.class_name}" == plugin.MODEL
    for config in CONFIGS:
        assert type(AutoConfig.for_model(config.model_type, hidden_act="relu")) is config
    assert type(AutoConfig.for_model("llama")).__module__.startswith("transformers.")
    assert quantization.get_quantization_config("twell") is TwellConfig
    assert fresh == []


def test_we_want_no_foreign_checkpoint() -> None:
    from vllm_spense.serving.config import SpenseConfig
    from vllm_spense.serving.twell import TwellConfig

    for asked in (None, "fp8", "spense", "twell"):
        for config in (SpenseConfig, TwellConfig):
            assert config.override_quantization_method(FOREIGN, asked, hf_config=None) is None


def test_importing_the_plugin_is_cheap() -> None:
    """Entry points are imported in every vLLM process, whatever model it serves."""
    code = "import sys, vllm_spense.serving.plugin; print(sorted({'vllm', 'torch'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_entry_point_names_register() -> None:
    from importlib.metadata import entry_points

    (point,) = entry_points(group="vllm.general_plugins", name="spense")
    assert point.load() is plugin.register


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path, tiny_spense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `plugin_cases.py` saw: real vLLM, real entry points, no engine."""
    fp8 = tmp_path_factory.mktemp("foreign") / "fp8"
    shutil.copytree(tiny_llama, fp8)
    config = json.loads((fp8 / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps(config | {"quantization_config": FOREIGN}))
    command = [sys.executable, str(Path(__file__).with_name("plugin_cases.py"))]
    command += [str(tiny_llama), str(fp8), str(tiny_spense)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "known"),
    [("other", False), ("empty", False), ("broken", False), ("named", True), ("again", True)],
)
def test_vllm_loads_the_plugin_when_it_may(loaded: dict[str, Any], case: str, known: bool) -> None:
    assert loaded[case] is known


def test_foreign_models_are_what_they_were(loaded: dict[str, Any]) -> None:
    foreign = [[None, None], ["fp8", "Fp8Config"]]
    assert loaded["models while broken"] == foreign
    assert loaded["models"] == [*foreign, ["spense", "SpenseConfig"]]
