"""Where the time of a step goes: kinds of kernels, differences of profiles, gaps, tables and plot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.common.results import RESULTS, ROOT, read, write
from benchmarks.serving.engine import Point, profiled, start_profiler, stop_profiler
from benchmarks.serving.profile import (
    CATEGORIES,
    GAPS,
    breakdown,
    category,
    chosen,
    largest,
    merged,
    per_step,
    shorten,
)
from benchmarks.serving.report import filled, profile_lines, profiled_steps, report, serving_lines

TUPLE = "cute::tuple<cute::C<128>, cute::C<128>, cute::C<128> >"
CUTLASS = (
    "void cutlass::device_kernel<{}<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>, "
    "cutlass::gemm::collective::CollectiveMma<cutlass::gemm::{}<5, cute::tuple<cute::C<2>, cute::C<1>, "
    "cute::C<1> >, cutlass::gemm::KernelTmaWarpSpecializedPingpong>, " + TUPLE + ", cutlass::float_e4m3_t, "
    "cute::tuple<long, cute::C<1>, long>, cute::TiledMMA<cute::MMA_Atom<cute::SM90::GMMA::MMA_64x128x32_F32>>"
    ">, cutlass::epilogue::collective::CollectiveEpilogue<cutlass::epilogue::Sm90TmaWarpSpecialized<4, 2>>>>("
    "cutlass::gemm::kernel::GemmUniversal::Params)"
)
FLASH3 = (
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<"
    "flash::CollectiveMainloopFwdSm90<2, cute::tuple<cute::C<1>, cute::C<1>, cute::C<1> >, "
    + TUPLE
    + ", 128, "
    "cutlass::bfloat16_t, float, cutlass::arch::Sm90, true, false, false, true>>>>(flash::Params)"
)
ATEN = "void at::native::{}<at::native::{}<float, float, long, 4, 4>>({})"
KERNELS = {
    "sparse GEMM": (
        "void spense::sm90::linear_kernel<spense::sm90::Shape<1, 32, false, 4, false> >(CUtensorMap_st, "
        "CUtensorMap_st, CUtensorMap_st, spense::sm90::KernelParams)",
        CUTLASS.format("spense::enable", "MainloopSm90TmaGmmaWarpSpecializedSparseFP8"),
        CUTLASS.format("spense::enable", "MainloopSm100TmaUmmaWarpSpecializedSparse"),
        "_kernel",
        "spense::linear",
        "spense::triton_linear",
    ),
    "dense GEMM": (
        CUTLASS.format("vllm::enable_sm90_or_later", "MainloopSm90TmaGmmaWarpSpecializedFP8"),
        CUTLASS.format("at::cuda::detail::enable_3x_kernel_for_sm9x", "MainloopSm90TmaGmmaWarpSpecialized"),
        "nvjet_qqtst_112x128_128x7_2x1_v_bz_coopA_algo2_TNN",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN",
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x128_warpgroupsize1x1x1_execute_kernel__5x_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(float const*)",
        "void gemvNSP_kernel<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 1, 32, 4, 1024>(int)",
        "aten::mm",
        "spense::dense_linear",
    ),
    "quantisation": (
        "void vllm::dynamic_per_token_scaled_fp8_quant_kernel_strided<c10::BFloat16, c10::Float8_e4m3fn>("
        "c10::Float8_e4m3fn*, float*, c10::BFloat16 const*, float const*, int, long, long)",
        "triton_red_fused__to_copy_abs_amax_clamp_div_0",
        "triton_poi_fused_dynamic_per_token_scaled_fp8_quant_view_1",
        "_per_token_group_quant_fp8",
    ),
    "attention": (
        FLASH3,
        "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cutlass::bfloat16_t>>(flash::Params)",
        "void flash::prepare_varlen_num_blocks_kernel<1, true>(int, int, int, int const*)",
        "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16, "
        "(vllm::Fp8KVCacheDataType)0>(__nv_bfloat16 const*, __nv_bfloat16 const*)",
        "void vllm::merge_attn_states_kernel<__nv_bfloat16, unsigned int, 128>(__nv_bfloat16*)",
        "kernel_unified_attention_2d",
        "_compute_slot_mappings_kernel",
        "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0>(Params)",
    ),
    "norm, activation": (
        "void vllm::rms_norm_kernel<c10::BFloat16, 8, 2>(c10::BFloat16*, c10::BFloat16 const*)",
        "std::enable_if<(8>0)&&vllm::_typeConvert<c10::BFloat16>::exists, void>::type "
        "vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(c10::BFloat16*, long, c10::BFloat16*)",
        "void vllm::rms_norm_dynamic_per_token_quant_kernel<c10::BFloat16, c10::Float8_e4m3fn, true>(float*)",
        "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel<c10::BFloat16>, true>(int)",
        "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*, c10::BFloat16*)",
        "void tensorrt_llm::kernels::fusedQKNormRopeKernel<128, true>(void*, int, int, int)",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2",
        "triton_red_fused__to_copy_abs_add_amax_clamp_div_mean_mul_pow_rsqrt_3",
        "triton_poi_fused_mul_silu_slice_4",
        "triton_poi_fused_cat_index_select_unified_attention_with_output_view_5",
        "triton_poi_fused_cutlass_scaled_mm_empty_0",
    ),
    "sampling": (
        ATEN.format("reduce_kernel", "ReduceOp", "at::native::ArgMaxOps<float>"),
        ATEN.format("vectorized_gather_kernel", "Char", "char*, char*, long*, int, long, long"),
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>(float*)",
        "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u, float, int>(float*)",
        "triton_red_fused_argmax_0",
        "_gumbel_sample_kernel",
        "_topk_log_softmax_kernel",
        "aten::index_select",
    ),
    "other": (
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        ATEN.format("vectorized_elementwise_kernel", "FillFunctor", "int"),
        "aten::copy_",
    ),
}


@pytest.mark.parametrize(
    ("kind", "kernel"), [(kind, name) for kind, names in KERNELS.items() for name in names]
)
def test_kinds_of_kernels(kind: str, kernel: str) -> None:
    assert category(kernel) == kind
    assert category(shorten(kernel)) == kind, shorten(kernel)
    assert len(shorten(kernel)) <= 400


def test_short_names_keep_what_tells_kernels_apart() -> None:
    dense, sparse = (
        shorten(CUTLASS.format("e", f"MainloopSm90TmaGmmaWarpSpecialized{x}")) for x in ("FP8", "SparseFP8")
    )
    assert dense != sparse
    assert "cute::" not in dense
    assert (
        shorten("void vllm::rms_norm_kernel<c10::BFloat16>(int)")
        == "void vllm::rms_norm_kernel<c10::BFloat16>(int)"
    )
    tiles = {CUTLASS.format("e", "M").replace("C<128>", f"C<{n}>"): [n, 1.0] for n in (64, 128)}
    assert list(merged(tiles).values()) == [[192, 2.0]], "times of one short name are added"


def test_points_to_profile() -> None:
    decode, prompts = [Point(b, 128, 16) for b in (32, 8, 1)], [Point(1, 128, 1), Point(1, 8192, 1)]
    wanted = [Point(32, 128, 16), Point(1, 128, 16), Point(1, 8192, 1)]
    assert chosen([*decode, *prompts, Point(4, 8192, 1), Point(1, 4096, 16)]) == wanted
    assert chosen([*decode[1:], prompts[0]]) == [Point(1, 128, 16), Point(1, 128, 1)]
    assert chosen([]) == []
    assert all(Point.of(point.key) == point for point in wanted)


def test_a_decode_step_is_what_more_tokens_add() -> None:
    first = {"gemm": [2, 100.0], "prompt": [3, 50.0], "norm": [1, 9.0]}
    whole = {"gemm": [10, 180.0], "prompt": [3, 58.0], "norm": [5, 8.0], "decode": [4, 40.0]}
    assert per_step(whole, first, 4) == {"gemm": [2, 20.0], "norm": [1, 0.0], "decode": [1, 10.0]}


def test_gaps_are_what_kernels_do_not_fill() -> None:
    kernels = {"nvjet_a": [1, 30.0], "nvjet_b": [1, 20.0], "Memset": [1, 5.0], "Memcpy": [2, 6.0]}
    parts = breakdown(kernels, 100e-6)
    assert list(parts) == list(CATEGORIES)
    assert (parts["dense GEMM"], parts["other"]) == (50, 11)
    assert parts[GAPS] == pytest.approx(39)
    assert breakdown(kernels, 10e-6)[GAPS] == 0, "overlapping kernels"
    assert largest(kernels, "other", 1) == [("Memcpy", 6.0)]


def test_operators_of_a_cpu_are_recorded() -> None:
    worker, x = SimpleNamespace(), torch.ones(8, 8)
    start_profiler(worker)
    with torch.profiler.record_function("a name for a part"):
        for _ in range(3):
            x = x @ x
    kernels = stop_profiler(worker)
    assert kernels["aten::mm"][0] == 3
    assert kernels["aten::mm"][1] > 0
    assert "a name for a part" not in kernels
    assert not vars(worker)


def test_kernels_of_a_gpu_are_told_from_calls_and_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    events = [
        SimpleNamespace(
            key=key, device_type=device, is_user_annotation=annotation, count=2, self_device_time_total=7.0
        )
        for key, device, annotation in (
            ("nvjet_tst", DeviceType.CUDA, False),
            ("Torch-Compiled Region: 0/0", DeviceType.CUDA, True),
            ("cudaGraphLaunch", DeviceType.CPU, False),
        )
    ]
    profiler = SimpleNamespace(stop=lambda: None, key_averages=lambda: events)
    assert stop_profiler(SimpleNamespace(kernel_profiler=profiler)) == {"nvjet_tst": [2, 7.0]}


def test_an_engine_that_cannot_profile_says_why() -> None:
    def fail(function: Any) -> None:
        raise OSError("no CUPTI")

    assert profiled(SimpleNamespace(collective_rpc=fail), [], None) == {"error": "OSError: no CUPTI"}


# --- the report ---------------------------------------------------------------------------------------------


def invented(ratio: str = "0.5") -> dict[str, Any]:
    """A pair of engines: 10 ms against 8 ms a step, 8 ms and 7 ms of them in kernels, 1 ms unknown."""
    dense = {"nvjet_a": [64, 6000.0], "Memcpy": [2, 1000.0], "flash::fwd": [64, 1000.0]}
    spense = {"_kernel": [64, 5000.0], "nvjet_a": [64, 1000.0], "flash::fwd": [64, 1000.0]}
    point = {
        "dense_seconds": [1.5, 1.27, 1.2],
        "spense_seconds": [1.0, 1.016, 1.1],
        "dense_tokens_per_second": 3200.0,
        "spense_tokens_per_second": 4000.0,
        "speed_up": 1.25,
        "speed_up_range": [1.09, 1.5],
    }
    return {
        "engines": {
            variant: {"start_seconds": seconds, "memory": [{"weights": size, "allocated": 0}]}
            for variant, seconds, size in (("dense", 60.4, 34.3e9), (ratio, 71.0, 29.6e9))
        },
        "points": {"32x128+128": point},
        "profiles": {"32x128+128": {"dense": dense, ratio: spense}, "1x8192+1": {"error": "no CUPTI"}},
        "made": {"device": "Invented GPU", "date": "2000-01-01", "commit": "abc", "versions": {"vllm": "0"}},
    }


def test_the_report_says_what_was_measured() -> None:
    pairs = {"Qwen3-32B/0.5": invented()}
    lines = serving_lines(pairs)
    assert "| Qwen3-32B | 0.5 | decode 32 × 128 | 3,200 | 4,000 | 1.250× (1.090 … 1.500) |" in "\n".join(
        lines
    )
    assert "| Qwen3-32B | 0.5 | 34.30 → 29.60 | 60 → 71 |" in "\n".join(lines)
    assert "Invented GPU, 2000-01-01, commit abc, vllm 0." in lines[0]
    text = "\n".join(profile_lines(pairs))
    rows = [line.split(" | ", 3)[3] for line in text.splitlines() if line.startswith("| Qwen3-32B | 0.5 |")]
    assert rows == [
        "dense | 10.00 | – | 6.00 | – | 1.00 | – | – | 1.00 | 2.00 | 130 |",
        "Spense | 8.00 | 5.00 | 1.00 | – | 1.00 | – | – | – | 1.00 | 192 |",
    ]
    assert "- Qwen3-32B 0.5, decode 32 × 128, dense: other is 10% (`Memcpy` 1000 µs)" in text
    assert "- Qwen3-32B/0.5, prefill 1 × 8192: no profile (no CUPTI)" in text


def test_without_a_timing_there_is_no_step() -> None:
    entry = invented()
    entry["points"].clear()
    assert list(profiled_steps({"Qwen3-32B/0.5": entry})) == []


def test_the_document_is_filled_and_the_plot_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document, plot = tmp_path / "docs" / "performance.md", tmp_path / "docs" / "img" / "serving_profile.png"
    document.parent.mkdir()
    marked = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("serving", "profile"))
    document.write_text(f"before\n{marked}after\n")
    report(tmp_path / "none.json", tmp_path)
    text = document.read_text()
    assert "Nothing has been served on a GPU yet." in text
    assert "No profile has been measured yet." in text
    assert "old" not in text
    assert "serving_profile.png" not in text
    assert not plot.exists(), "no empty plot"
    write(
        tmp_path / "some.json", {"pairs": {"Qwen3-32B/0.5": invented(), "Qwen3-32B/0.25": invented("0.25")}}
    )
    report(tmp_path / "some.json", tmp_path)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "![time of a step by kind of kernel](img/serving_profile.png)" in text
    assert plot.stat().st_size > 10_000


def test_the_document_shows_the_results_that_are_there() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    pairs = read(RESULTS / "serving_decode.json").get("pairs", {})
    assert filled(text, pairs) == text, "run: python -m benchmarks.serving.report"
