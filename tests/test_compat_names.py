"""docs/compat.md and the pages beside it have a row for each name of the libraries that they map."""

from __future__ import annotations

import pathlib
import re

import pytest
from test_compat import COMBINE, DISPATCH, HYBRID_EP_DISPATCH, METHODS, OF_MEGATRON, OF_NEMO, OF_NEMO_INIT, PUBLISHED

from jax_ep import compat
from jax_ep.compat import fused_a2a

DOCS = pathlib.Path(__file__).parents[1] / "docs"

# The names of each library, by the sections that have their rows. Arguments and attributes too.
ROWS: dict[tuple[tuple[str, str], ...], str] = {
    # github.com/deepseek-ai/DeepEP, deep_ep/buffers/legacy.py at 189df34.
    (
        ("compat", "DeepEP V1: "),
    ): f"runtime nvshmem_qp_depth use_fabric is_token_in_rank recv_count {DISPATCH} {COMBINE}",
    # deep_ep/buffers/elastic.py at 0297fc8.
    (("compat", "V2: "), ("migration/deepep", "Names: V2, ")): (
        "ElasticBuffer EPHandle num_bytes num_cpu_bytes num_max_tokens_per_rank hidden num_topk use_fp8_dispatch "
        "deterministic allow_hybrid_mode allow_multiple_reduction prefer_overlap_with_compute sl_idx "
        "num_allocated_qps num_cpu_timeout_secs num_gpu_timeout_secs explicitly_destroy rank_idx num_ranks "
        "num_scaleout_ranks num_scaleup_ranks scaleout_rank_idx scaleup_rank_idx num_rdma_ranks num_nvlink_ranks "
        "runtime destroy get_buffer_size_hint get_engram_storage_size_hint get_pp_buffer_size_hint "
        "get_agrs_num_max_session_bytes get_agrs_buffer_size_hint barrier capture get_comm_stream "
        "get_physical_domain_size get_logical_domain_size engram_write engram_fetch pp_set_config pp_send pp_recv "
        "create_agrs_session destroy_agrs_session agrs_new_session agrs_set_config agrs_get_inplace_tensor all_gather "
        "get_theoretical_num_sms get_theoretical_num_qps dispatch cumulative_local_expert_recv_stats num_sms num_qps "
        "previous_event_before_epilogue async_with_compute_stream allocate_on_comm_stream handle do_handle_copy "
        "do_cpu_sync do_expand do_zero_padding use_tma_aligned_col_major_sf"
    ),
    # deep_ep/hybrid_ep_buffer.py at 098da2a, older at 017a520; newer as NeMo calls it at e8d06c8.
    (("compat", "`deep_ep.HybridEPBuffer`"),): (
        "HybridEPBuffer HybridEpBuffer group hidden_dim max_num_of_tokens_per_rank num_local_experts num_of_experts "
        "num_of_experts_per_rank use_fp8 num_sms_dispatch_api num_sms_combine_api num_sms_preprocessing_api "
        "num_sms_permute_api nvlink_domain_size num_of_ranks_per_nvlink_domain use_mnnvl indices_to_map "
        "init_buffer_config init_kernel_config update_kernel_config update_template_config empty_jit_cache "
        "load_cached_kernels dispatch combine dispatch_with_permute combine_with_unpermute hidden scaling_factor "
        "topk_idx topk_weights routing_map probs num_dispatched_tokens_tensor num_dispatched_tokens handle "
        "num_permuted_tokens pad_multiple non_blocking num_blocks_permute num_blocks_unpermute fuse_permute_dispatch "
        "fuse_unpermute_combine"
    ),
    # github.com/uccl-project/uccl, ep/bench/buffer.py at 00aed70.
    (("compat", "UCCL-EP: "),): (
        "UCCLBuffer is_intranode reset_rdma_buffer connect_atomic_buffer check_nvlink_connections get_rdma_buffer "
        "Proxy UcclProxy initialize_uccl destroy_uccl"
    ),
    # ep/jax_wrapper/uccl_ep_jax/__init__.py and bootstrap.py at 0394d1a, lax/moe.py at 18f3713.
    (("compat", "`uccl_ep_jax`"),): (
        "Config set_default_num_sms get_dispatch_config get_combine_config JaxExecutionMode detect_execution_mode "
        "is_multi_process_mode is_single_process_mode get_global_rank get_global_world_size get_local_rank "
        "get_local_world_size initialize shutdown get_buffer Buffer moe_dispatch moe_combine low_latency_dispatch "
        "low_latency_combine moe_low_latency_dispatch moe_low_latency_combine get_low_latency_rdma_size_hint "
        "get_nvl_buffer_size_hint get_rdma_buffer_size_hint register_ffi_targets num_rdma_ranks num_max_nvl_peers "
        "source_meta_bytes num_ranks expert_alignment config bias"
    ),
    # github.com/NVIDIA-NeMo/Automodel, nemo_automodel/components/moe/megatron/fused_a2a.py at e8d06c8;
    # the V2 ones as in tests/unit_tests/moe/test_deepep_v2_fused_a2a.py at 1865fde.
    (("compat", "Megatron-LM and NeMo"),): (
        "destroy_buffer get_hybrid_ep_initialized_capacity publish_hybrid_ep_initialized_capacity "
        "store_hybrid_ep_jit_cache deepep_dispatch_replay hybridep_dispatch_replay finalize_hybridep_dispatch_records "
        "FusedDispatch FusedCombine HybridEPDispatch HybridEPCombine UCCLFusedDispatch UCCLFusedCombine "
        "init_deepep_v2_buffer destroy_deepep_v2_buffer set_deepep_v2_num_sms set_deepep_v2_num_qps "
        f"DeepEPV2FusedDispatch DeepEPV2FusedCombine {OF_MEGATRON} {OF_NEMO} {OF_NEMO_INIT} {HYBRID_EP_DISPATCH}"
    ),
    # github.com/microsoft/mscclpp, python/mscclpp/ep/__init__.py and communicator.py at 13e5017, types.py at 009b9d3.
    (("compat", "MSCCL++ EP: "),): (
        "FP8_DEEPGEMM_ABI FP8_DEEPGEMM_SCALE_BLOCK_SIZE BlockOverlapConfig CommOverlapConfig CombineContext "
        "CombineMode DispatchHandle DispatchDataType DispatchLayout DispatchLayoutInfo DispatchOutput "
        "DispatchOutputInfo ExpertMajorDispatchHandle ExpertMajorCombineContext HighThroughputDispatchHandle "
        "HighThroughputCombineContext MoECommunicator MoECommunicatorConfig MoEMode OperationOverlapConfig "
        "QuantConfig RankMajorDispatchHandle RankMajorCombineContext comm device num_experts num_local_experts "
        "local_expert_start hidden_size topk max_tokens_per_rank mode output_layout invalid_token_expert_id quant "
        "num_sms latency_num_blocks combine_mode enable_overlap expert_alignment format block_scales tokens topk_ids "
        "weights num_tokens_per_rank operation block level overlap_config stream wait_event num_comm_sms block_size_m "
        "ready_signal ready_value rank world_size local_rank is_available is_internode_available is_internode "
        "dispatch combine input output_buffer previous_handle runtime_max_tokens_per_rank expert_output handle out "
        "get_dispatch_output_buffer get_combine_input_buffer get_expert_output_buffer execution_receipt "
        "dispatch_async combine_async create_overlap_config"
    ),
    # github.com/NVIDIA/TransformerEngine, transformer_engine/pytorch/ep.py at 008c3d2.
    (("compat", "Transformer Engine EP"),): (
        "ep_bootstrap ep_group num_experts max_tokens_per_rank recv_capacity_per_rank hidden_dim max_num_sms "
        "zero_copy max_token_dtype ep_finalize EpBuffer top_k num_local_experts alignment payload_dtype device "
        "dispatch_recv_tokens combine_grad_expert_out ep_prepare ep_dispatch ep_combine symm_mem_alloc buffer tokens "
        "topk_idx topk_weights recv_tokens recv_topk_weights expert_out num_local_tokens"
    ),
    # transformer_engine/jax/ep.py at 00145f7; EpLayerConfig is of later versions.
    (("migration/transformer_engine", "Names"),): (
        "EpHandle ep_make_handle EpLayerConfig ep_bootstrap world_size rank ep_size num_experts max_tokens_per_rank "
        "recv_capacity_per_rank hidden_dim max_num_sms allow_handle_mem_reloc max_token_dtype ep_prepare ep_dispatch "
        "topk_idx tokens topk_weights handle_mem token_counts ep_combine expert_out recv_topk_weights "
        "num_local_tokens out_sharding ep_resource dp_resource fsdp_resource"
    ),
}


def words(text: str) -> set[str]:
    """All names in backticks."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", text))))


def section(page: str, heading: str) -> str:
    """Up to the next heading, of whatever level."""
    text = (DOCS / f"{page}.md").read_text()
    (found,) = (part for part in re.split(r"^#+ ", text, flags=re.MULTILINE) if part.startswith(heading))
    return found


def test_every_name_is_on_the_page():
    ours = {"dispatch", "destroy", *compat.__all__, *fused_a2a.__all__, *METHODS, *(f.__name__ for f in PUBLISHED)}
    arguments = {name for text in (*PUBLISHED.values(), OF_MEGATRON, OF_NEMO) for name in text.split()}
    on_page = words((DOCS / "compat.md").read_text())
    missing = (ours | arguments) - on_page - {"x", "dtype", "size", "offset", "proxy", "mask_status"}
    assert not missing, missing


@pytest.mark.parametrize("places", ROWS, ids=lambda places: places[0][1].strip("` :,"))
def test_every_name_has_a_row(places):
    """In the table of its library, whether there is one here or not."""
    found = set().union(*(words(section(*place)) for place in places))
    missing = set(ROWS[places].split()) - found
    assert not missing, missing
