"""All that vllm-spense relies on in vLLM, each entry with its reason. `contract_check.py` checks it.

A version that breaks an entry breaks Spense checkpoints there. New imports or calls of vLLM in the package
must be entered here, or `test_contracts.py` fails; then the snapshots of the wheels need a refresh.
"""

from __future__ import annotations

from dataclasses import dataclass

CONFIG = "vllm_spense.serving.config:SpenseConfig"
BITSANDBYTES = "vllm_spense.serving.bitsandbytes:BitsAndBytesConfig"
METHOD = "vllm_spense.serving.layers.linear:SpenseLinearMethod"
ONLINE = "vllm_spense.serving.layers.online:SpenseOnlineLinearMethod"
TWELL = "vllm_spense.serving.twell:TwellConfig"
SPARSE_MLP = "vllm_spense.serving.layers.sparse_mlp:SparseMlpMethod"
SPARSE_INPUT = "vllm_spense.serving.layers.sparse_input:SparseInputLinearMethod"
SPARSE_LLAMA = "vllm_spense.serving.models.sparse_llama:SparseLlamaForCausalLM"
SPARSE_LAYER = "vllm_spense.serving.models.sparse_llama:SparseDecoderLayer"
LOADERS = (
    "vllm_spense.serving.loading:make_loader.spense_weight_loader",
    "vllm_spense.serving.layers.online:_make_dense_loader.spense_dense_loader",
    "vllm_spense.serving.layers.prepared:make_loader.spense_slice_loader",
)

LINEAR = "vllm.model_executor.layers.linear"
QUANTIZATION = "vllm.model_executor.layers.quantization"
QUANT_UTILS = f"{QUANTIZATION}.utils.quant_utils"
BASE_CONFIG = f"{QUANTIZATION}.base_config"
KERNELS = "vllm.model_executor.kernels.linear"
LOADER = "vllm.model_executor.model_loader"
MODELS = "vllm.model_executor.models"
LLAMA = f"{MODELS}.llama"
RELOAD = f"{LOADER}.reload.layerwise"


@dataclass(frozen=True)
class Call:
    """Shape of a call: positional arguments (without ``self``) and sorted keywords."""

    args: int = 0
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Uses:
    """A vLLM name that our code uses. ``imported`` False: we only get objects of it.

    ``objects``: expressions in ``vllm_spense/serving`` that hold an instance, whose ``attributes`` we read
    and whose ``methods`` we call.
    """

    key: str
    kind: str
    why: str
    imported: bool = True
    calls: tuple[Call, ...] = ()
    attributes: tuple[str, ...] = ()
    methods: tuple[tuple[str, Call], ...] = ()
    objects: tuple[str, ...] = ()
    value: object = None


@dataclass(frozen=True)
class Overrides:
    """Members of a vLLM base class that our class replaces; no abstract one may be left. ``younger``: those
    that old versions lack, where our class says so instead of loading."""

    ours: str
    base: str
    members: tuple[str, ...]
    younger: tuple[str, ...] = ()


@dataclass(frozen=True)
class Called:
    """Calls of our function that vLLM makes: ``receiver.name(…)`` in at least one of ``modules``."""

    ours: tuple[str, ...]
    name: str
    receivers: tuple[str, ...]
    modules: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Marks:
    """Code that must stand in a vLLM function, in this order, because we rely on its effect."""

    module: str
    function: str
    patterns: tuple[str, ...]
    why: str


USES = (
    Uses(
        f"{QUANTIZATION}:register_quantization_config",
        "function",
        "plugin.register makes `quant_method: spense` known",
        calls=(Call(1),),
    ),
    Uses(
        f"{QUANTIZATION}:QUANTIZATION_METHODS",
        "value",
        "the doctor looks for us in it; a failed registration is taken out of it",
    ),
    Uses(
        f"{BASE_CONFIG}:QuantizationConfig",
        "class",
        "base of SpenseConfig; vLLM fills packed_modules_mapping, which names the parts of fused layers",
        calls=(Call(),),
        attributes=("packed_modules_mapping",),
    ),
    Uses(f"{BASE_CONFIG}:QuantizeMethodBase", "class", "what get_quant_method returns"),
    Uses(
        f"{LINEAR}:LinearBase",
        "class",
        "only linear layers get a method; create_weights reads the layer's tensor-parallel position",
        attributes=("tp_rank", "tp_size"),
        objects=("layer",),
    ),
    Uses(f"{LINEAR}:LinearMethodBase", "class", "base of our linear methods"),
    Uses(
        f"{LINEAR}:QKVParallelLinear",
        "class",
        "its heads must not be cut",
        attributes=("head_size",),
        objects=("layer",),
    ),
    Uses(
        f"{LINEAR}:ReplicatedLinear",
        "class",
        "routers stay unquantized in load-time mode",
        attributes=("bias",),
        objects=("layer",),
    ),
    Uses(
        f"{LINEAR}:UnquantizedLinearMethod",
        "class",
        "layers that are not listed, and bf16 checkpoints after decompression",
        calls=(Call(),),
        methods=(("process_weights_after_loading", Call(1)), ("apply", Call(3))),
        objects=("self.method",),
    ),
    Uses(
        "vllm.model_executor.parameter:BasevLLMParameter",
        "class",
        "our parameters carry their own loader",
        calls=(Call(0, ("data", "weight_loader")),),
        attributes=("weight_loader",),
    ),
    Uses(
        f"{RELOAD}:initialize_online_processing",
        "function",
        "load-time mode prunes each layer when its shards have arrived",
        calls=(Call(1),),
    ),
    Uses(
        f"{KERNELS}:init_fp8_linear_kernel",
        "function",
        "GPUs without a kernel of ours run vLLM's dense FP8 kernel",
        calls=(
            Call(
                0,
                (
                    "activation_quant_key",
                    "input_dtype",
                    "module_name",
                    "out_dtype",
                    "weight_quant_key",
                    "weight_shape",
                ),
            ),
        ),
    ),
    Uses(
        f"{KERNELS}.scaled_mm.ScaledMMLinearKernel:FP8ScaledMMLinearKernel",
        "class",
        "what init_fp8_linear_kernel returns",
        imported=False,
        methods=(("process_weights_after_loading", Call(1)), ("apply_weights", Call(3))),
        objects=("self.kernel",),
    ),
    Uses(f"{QUANT_UTILS}:kFp8DynamicTokenSym", "value", "scheme of our activations"),
    Uses(f"{QUANT_UTILS}:kFp8StaticChannelSym", "value", "scheme of our weights"),
    Uses(
        "vllm.config:get_current_vllm_config_or_none",
        "function",
        "--load-format dummy fills the weights with random values",
        calls=(Call(),),
    ),
    Uses(
        "vllm.config:VllmConfig",
        "class",
        "holds the load format",
        imported=False,
        attributes=("load_config",),
        objects=("config",),
    ),
    Uses(
        "vllm.config.load:LoadConfig",
        "class",
        "holds the load format",
        imported=False,
        attributes=("load_format",),
        objects=("config.load_config",),
    ),
    Uses(
        "vllm.model_executor.models.utils:WeightsMapper",
        "class",
        "renames the modules of the checkpoint to vLLM's, and tensors beside weights of bitsandbytes",
        calls=(Call(0, ("orig_to_new_suffix",)),),
        methods=(("apply_dict", Call(1)),),
        objects=("hf_to_vllm_mapper",),
    ),
    Uses(
        "vllm.transformers_utils.config:get_safetensors_params_metadata",
        "function",
        "which modules of a bitsandbytes checkpoint are in 4 bits, in a directory or on the hub",
        calls=(Call(1, ("revision",)),),
    ),
    Uses(
        f"{MODELS}.registry:ModelRegistry",
        "value",
        "plugin.register makes architectures known",
    ),
    Uses(
        f"{MODELS}.registry:_ModelRegistry",
        "class",
        "what the registry is",
        imported=False,
        methods=(("register_model", Call(2)),),
        objects=("ModelRegistry",),
    ),
    Uses(
        f"{LLAMA}:LlamaForCausalLM",
        "class",
        "base of our Llama: forward, logits, pipeline stages, LoRA",
        attributes=("model", "lm_head"),
    ),
    Uses(f"{LLAMA}:LlamaDecoderLayer", "class", "base of our layer, for its forward"),
    Uses(
        f"{LLAMA}:LlamaAttention",
        "class",
        "our layer's attention",
        calls=(
            Call(
                0,
                (
                    "bias",
                    "bias_o_proj",
                    "cache_config",
                    "config",
                    "hidden_size",
                    "max_position_embeddings",
                    "num_heads",
                    "num_kv_heads",
                    "prefix",
                    "quant_config",
                ),
            ),
        ),
    ),
    Uses(
        "vllm.model_executor.layers.layernorm:RMSNorm",
        "class",
        "our layer's norms",
        calls=(Call(1, ("eps",)),),
    ),
    Uses(
        f"{LINEAR}:ColumnParallelLinear",
        "class",
        "the gate of an activation-sparse MLP",
        calls=(Call(2, ("bias", "prefix", "quant_config")),),
        attributes=("tp_rank", "tp_size"),
        objects=("self.gate_proj",),
    ),
    Uses(
        "vllm.distributed.communication_op:tensor_model_parallel_all_reduce",
        "function",
        "sums the ranks' neurons",
        calls=(Call(1),),
    ),
    Uses(
        f"{LOADER}.weight_utils:default_weight_loader",
        "function",
        "loads parameters without a loader, norms",
        calls=(Call(2),),
    ),
    Uses(
        f"{MODELS}.utils:is_pp_missing_parameter",
        "function",
        "tensors of other pipeline stages",
        calls=(Call(2),),
    ),
    Uses("vllm.logger:init_logger", "function", "log lines in vLLM's format", calls=(Call(1),)),
    Uses(
        "vllm.plugins:DEFAULT_PLUGINS_GROUP",
        "value",
        "the entry point group that we register in",
        imported=False,
        value="vllm.general_plugins",
    ),
    Uses(
        "vllm.plugins:load_general_plugins",
        "function",
        "calls our entry point",
        imported=False,
        calls=(Call(),),
    ),
    Uses(
        "vllm.entrypoints.openai:api_server",
        "module",
        "the demo starts this module as a program",
        imported=False,
    ),
)

CONFIG_METHODS = (
    "get_name",
    "get_supported_act_dtypes",
    "get_min_capability",
    "get_config_filenames",
    "from_config",
    "maybe_update_config",
    "apply_vllm_mapper",
    "get_quant_method",
)
"""What each of our quantization configs overrides."""

OVERRIDES = (
    Overrides(
        CONFIG,
        f"{BASE_CONFIG}:QuantizationConfig",
        (*CONFIG_METHODS, "override_quantization_method"),
    ),
    Overrides(
        BITSANDBYTES,
        f"{BASE_CONFIG}:QuantizationConfig",
        CONFIG_METHODS,
        younger=("get_checkpoint_weight_mapper",),
    ),
    Overrides(
        TWELL,
        f"{BASE_CONFIG}:QuantizationConfig",
        CONFIG_METHODS,
    ),
    Overrides(SPARSE_LLAMA, f"{LLAMA}:LlamaForCausalLM", ("load_weights", "packed_modules_mapping")),
    Overrides(
        SPARSE_LAYER,
        f"{LLAMA}:LlamaDecoderLayer",
        ("hidden_size", "input_layernorm", "mlp", "post_attention_layernorm", "self_attn"),
    ),
    Overrides(
        SPARSE_MLP,
        f"{BASE_CONFIG}:QuantizeMethodBase",
        ("create_weights", "process_weights_after_loading", "apply"),
    ),
    Overrides(
        SPARSE_INPUT,
        f"{LINEAR}:LinearMethodBase",
        ("create_weights", "process_weights_after_loading", "apply"),
    ),
    Overrides(
        METHOD,
        f"{LINEAR}:LinearMethodBase",
        ("create_weights", "process_weights_after_loading", "apply"),
    ),
    Overrides(
        ONLINE,
        f"{LINEAR}:LinearMethodBase",
        ("create_weights", "process_weights_after_loading", "apply", "uses_meta_device"),
    ),
)

CALLED = (
    Called(
        ("vllm_spense.serving.plugin:register",),
        "func",
        ("",),
        ("vllm.plugins",),
        "load_general_plugins runs the entry point, unguarded",
    ),
    Called(
        (f"{CONFIG}.maybe_update_config", f"{TWELL}.maybe_update_config"),
        "maybe_update_config",
        ("quant_config",),
        ("vllm.config.vllm",),
        "headers and hashes are checked before anything is loaded",
    ),
    Called(
        (f"{CONFIG}.get_min_capability", f"{TWELL}.get_min_capability"),
        "get_min_capability",
        ("quant_config",),
        ("vllm.config.vllm",),
        "refuses GPUs older than sm_80",
    ),
    Called(
        (f"{CONFIG}.get_supported_act_dtypes", f"{TWELL}.get_supported_act_dtypes"),
        "get_supported_act_dtypes",
        ("quant_config",),
        ("vllm.config.vllm",),
        "--dtype",
    ),
    Called(
        (f"{CONFIG}.from_config", f"{TWELL}.from_config"),
        "from_config",
        ("quant_cls",),
        (f"{LOADER}.weight_utils",),
        "config.json's quantization_config is parsed",
    ),
    Called(
        (f"{CONFIG}.get_config_filenames", f"{TWELL}.get_config_filenames"),
        "get_config_filenames",
        ("quant_cls",),
        (f"{LOADER}.weight_utils",),
        "no file names: load-time mode for models without quantization_config",
    ),
    Called(
        (f"{CONFIG}.__init__", f"{TWELL}.__init__"),
        "quant_cls",
        ("",),
        (f"{LOADER}.weight_utils",),
        "load-time mode",
    ),
    Called(
        (f"{CONFIG}.apply_vllm_mapper", f"{TWELL}.apply_vllm_mapper"),
        "apply_vllm_mapper",
        ("quant_config", "self.quant_config"),
        (f"{LOADER}.utils", "vllm.model_executor.models.interfaces"),
        "module names of multimodal models",
    ),
    Called(
        (f"{CONFIG}.get_quant_method", f"{TWELL}.get_quant_method"),
        "get_quant_method",
        ("quant_config", "self.quant_config"),
        (LINEAR, BASE_CONFIG, "vllm.model_executor.layers.attention.attention"),
        "which layer gets which method",
    ),
    Called(
        (f"{METHOD}.create_weights", f"{ONLINE}.create_weights", f"{SPARSE_INPUT}.create_weights"),
        "create_weights",
        ("self.quant_method",),
        (LINEAR,),
        "the layer's extents on this rank",
    ),
    Called(
        (f"{METHOD}.apply", f"{ONLINE}.apply", f"{SPARSE_INPUT}.apply"),
        "apply",
        ("self.quant_method", "self._get_quant_method()"),
        (LINEAR, "vllm.lora.layers.base_linear", "vllm.lora.layers.row_parallel_linear"),
        "the layer's forward, with and without LoRA",
    ),
    Called(
        (
            f"{METHOD}.process_weights_after_loading",
            f"{ONLINE}.process_weights_after_loading",
            f"{SPARSE_INPUT}.process_weights_after_loading",
            f"{SPARSE_MLP}.process_weights_after_loading",
        ),
        "process_weights_after_loading",
        ("quant_method",),
        (f"{LOADER}.utils", f"{LOADER}.dummy_loader", RELOAD),
        "after loading, after a reload, with dummy weights",
    ),
    Called(
        LOADERS,
        "weight_loader",
        ("", "param"),
        (LINEAR, "vllm.model_executor.models.utils", "vllm.model_executor.models.llama"),
        "every shard of every tensor",
    ),
)

_FORWARD = (
    "self.input_layernorm(",
    "self.self_attn(positions=positions, hidden_states=hidden_states)",
    "self.post_attention_layernorm(hidden_states, residual)",
    "self.mlp(hidden_states)",
)
_BIAS_WHY = "biases are created after our tensors and loaded by layer.weight_loader, which is then ours"
_BIAS = ("self.quant_method.create_weights(", "'weight_loader': self.weight_loader")
MARKS = (
    Marks(LLAMA, "LlamaDecoderLayer.forward", _FORWARD, "modules by the names that our layer gives them"),
    Marks(
        LLAMA,
        "LlamaModel.__init__",
        ("layer_type(vllm_config=vllm_config, prefix=prefix)",),
        "builds our layers",
    ),
    Marks(
        LLAMA,
        "LlamaForCausalLM.__init__",
        ("self.config = config", "layer_type=layer_type"),
        "hands our layer on; the loader reads config",
    ),
    *(
        Marks(LINEAR, f"{layer}.__init__", _BIAS, _BIAS_WHY)
        for layer in ("ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear")
    ),
    Marks(
        RELOAD,
        "_layerwise_process",
        (
            "delattr(layer, '_already_called_process_weights_after_loading')",
            "args.arguments['param'] = param",
            "quant_method.process_weights_after_loading(layer)",
        ),
        "a reload clears our flag, calls loaders by the name `param` and processes again",
    ),
    Marks(
        RELOAD,
        "initialize_online_processing",
        ("info.load_numel_total = get_layer_size(layer)",),
        "a layer is processed when as many elements as it has were loaded",
    ),
    Marks(
        f"{LOADER}.base_loader",
        "_has_online_quant",
        ("'uses_meta_device'",),
        "load-time mode says that its weights wait on the meta device",
    ),
    Marks(
        f"{LOADER}.weight_utils",
        "get_quant_config",
        ("quant_cls.get_config_filenames()", "if not possible_config_filenames", "quant_cls()"),
        "load-time mode: no file names, no arguments",
    ),
    Marks(
        f"{LOADER}.utils",
        "configure_quant_config",
        ("quant_config.apply_vllm_mapper(", "quant_config.packed_modules_mapping = packed_mapping"),
        "names of fused layers arrive before the layers are built",
    ),
    Marks(
        KERNELS,
        "init_fp8_linear_kernel",
        ("'weight'", "'weight_scale'", "'input_scale'", "'input_scale_ub'"),
        "names under which the FP8 kernel finds our tensors",
    ),
    Marks(
        "vllm.lora.layers.utils",
        "_get_lora_device",
        ("hasattr(base_layer, 'weight')", "hasattr(base_layer, 'weight_packed')"),
        "LoRA takes the device from one of these tensors",
    ),
)
