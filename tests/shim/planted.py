"""Faults to plant in the GPU kernels, one at a time (mutants.py), and the test under the shim that must catch each."""

from __future__ import annotations

from dataclasses import dataclass

# Tests that faults are caught by.
CUT = "test_shim_attention.py::test_decode_however_the_work_is_cut"
LAYOUTS = "test_shim_attention.py::test_decode_layouts"
GROUPS = "test_shim_attention_tiles.py::test_groups"
WINDOW = "test_shim_attention.py::test_decode_window"
BLOCKS = "test_shim_attention.py::test_decode_ignores_blocks_out_of_range"
TABLE_END = "test_shim_faults.py::test_what_a_table_does_not_have"
NAN = "test_shim_attention.py::test_nan_where_a_query_looks_shows"
FAR = "test_shim_attention.py::test_offsets_past_32_bits"
GENERIC = "test_shim_attention.py::test_generic"
PADDING = "test_shim_attention.py::test_tokens_of_no_sequence_are_zero"
LAYERS = "test_shim_properties.py::test_layers_that_share_a_plan"
GROWING = "test_shim_properties.py::test_scores_that_grow"
TILES = "test_shim_attention_tiles.py::test_however_the_work_is_cut"
TILES_WINDOW = "test_shim_attention_tiles.py::test_window"
TILES_BLOCKS = "test_shim_attention_tiles.py::test_blocks_out_of_range_are_masked"
FIXED = "test_shim_attention_split.py::test_a_sequence_is_the_same_in_any_company"
FIXED_RACES = "test_shim_attention_split.py::test_fixed_cuts_without_races"
CODES = "test_shim_attention_codes.py::test_however_the_work_is_cut"
CODES_NAN = "test_shim_attention_codes.py::test_nan_codes_show"
CODES_GROWING = "test_shim_attention_codes.py::test_scores_and_values_that_grow"
CODES_UNSEEN = "test_shim_attention_codes.py::test_what_nobody_sees_changes_nothing"
CODES_QUERIES = "test_shim_attention_codes.py::test_queries_beyond_f16"
BESIDE = "test_shim_attention_split.py::test_a_sequence_that_decodes_is_the_same_beside_prompts"
STALE = "test_shim_plan.py::test_a_plan_for_other_lengths_is_flagged"
STALE_TILES = "test_shim_plan.py::test_a_plan_for_other_queries_is_flagged"
PLAN_END = "test_shim_plan.py::test_a_plan_never_outgrows_its_memory"
STARTS = "test_shim_attention.py::test_query_starts_out_of_range_write_nothing_outside"
SEQUENCES = "test_shim_faults.py::test_sequences_that_cannot_be"
FALLING = "test_shim_faults.py::test_starts_that_fall"
NO_FAULTS = "test_shim_faults.py::test_nothing_is_flagged_where_nothing_is_wrong"
OTHER_PLAN = "test_shim_faults.py::test_a_plan_of_another_call"
OTHER_CASCADE = "test_shim_cascade.py::test_a_plan_of_other_shared_blocks_attends_to_nothing"
NO_END = "test_shim_faults.py::test_a_length_without_end"
MEMORY = "test_shim_memory.py::test_the_bound_is_reached_and_never_passed"
TINY = "test_shim_attention_codes.py::test_values_of_any_size"
DECODED = "test_shim_attention_codes.py::test_all_codes_are_decoded"
SMALL = "test_shim_attention_split.py::test_the_planner_cuts_no_small_pieces"
WRITE = "test_shim_cache.py::test_reshape_and_cache"
MOVE = "test_shim_cache.py::test_copy_and_zero"
UPDATE = "test_shim_cache.py::test_update_block_table"


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which stands once in `file`, becomes `new`; `test` must catch it in `build`."""

    name: str
    file: str
    old: str
    new: str
    test: str
    build: str = "plain"


MUTANTS = [
    Mutant(
        "plan that lengths left behind",
        "spans.h",
        "length * p.num_kv_heads != planned_end - tile.begin || ",
        "",
        STALE,
    ),
    Mutant(
        "plan of other tiles",
        "spans.h",
        " || !has_tiles_as_planned(p, plan, tile.seq)",
        "",
        STALE_TILES,
    ),
    Mutant(
        "missing barrier before the merge",
        "few_rows.h",
        "    device::sync_threads();  // the records take the place",
        "    // ",
        CUT,
        "races",
    ),
    Mutant(
        "missing barrier in the plan's scan",
        "plan.cu",
        "    sums[t] += left;\n    sync_threads();",
        "    sums[t] += left;",
        CUT,
        "races",
    ),
    Mutant("missing wait", "few_rows.h", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();", CUT),
    Mutant("missing sync_warp", "few_rows.h", "device::sync_warp();  // what every lane copied", "// ", CUT, "races"),
    Mutant(
        "divergent barrier",
        "attend.h",
        "    device::sync_threads();  // the next item's pipeline",
        "    if (device::thread_id() != 3) device::sync_threads();  // ",
        CUT,
    ),
    Mutant("off-by-one page", "load.h", "quotient(key, params", "quotient(key + 1, params", CUT),
    Mutant(
        "wrong stage index",
        "few_rows.h",
        "const int slot = stage % kStages;\n      const uint32_t valid",
        "const int slot = (stage + 1) % kStages;\n      const uint32_t valid",
        CUT,
    ),
    Mutant("unmasked tail", "scores.h", "index < end[c / 2]", "index <= end[c / 2]", CUT),
    Mutant("unmasked window edge", "scores.h", "index >= begin[c / 2]", "index + 1 >= begin[c / 2]", WINDOW),
    Mutant("bad block id", "page_of_key.h", "block >= 0 && block < p.num_blocks", "block >= 0", BLOCKS),
    Mutant("table read past its end", "page_of_key.h", "int>(p.max_blocks)}", "int>(p.max_blocks) + 1}", TABLE_END),
    Mutant(
        "NaN hidden",
        "finish.h",
        "total.w == 0.0f}",
        "!(total.w > 0.0f)}",
        NAN,
    ),
    Mutant(
        "missing fence before the last arriver's merge",
        "finish.h",
        "    device::fence();\n    *arrived",
        "    *arrived",
        CUT,
        "races",
    ),
    Mutant(
        "missing fence after the last arrival",
        "finish.h",
        "counters + first, 1);\n    device::fence();",
        "counters + first, 1);",
        CUT,
        "races",
    ),
    Mutant("int32 offset", "load.h", "block * p.k.block_stride", "static_cast<int32_t>(block * p.k.block_stride)", FAR),
    Mutant("V of unwritten slots", "load.h", "v + v_at + v_in, readable);", "v + v_at + v_in, true);", CUT),
    Mutant(
        "merge before the last piece",
        "finish.h",
        "if (*arrived != last - first) return;",
        "if (*arrived + 1 < last - first) return;",
        CUT,
        "races",
    ),
    Mutant(
        "counter not reset", "finish.h", "if (device::thread_id() == 0) pieces.plan.counters[first] = 0;", "//", LAYERS
    ),
    Mutant("sum not rescaled", "state.h", "  state.rounded[half] *= factor;\n", "", GROWING),
    Mutant("rows of the next tile", "rows.h", "s.tile * s.work.rows + r;", "s.tile * (s.work.rows - 1) + r;", GROUPS),
    Mutant(
        "missing sync_warp in the generic kernel",
        "attention_generic.cu",
        "  sync_warp();\n\n  const ScoreRule rule",
        "\n  const ScoreRule rule",
        GENERIC,
        "races",
    ),
    Mutant(
        "int32 offset in the generic kernel",
        "attention_generic.cu",
        "block * p.k.block_stride + kv_head",
        "static_cast<int32_t>(block * p.k.block_stride) + kv_head",
        FAR,
    ),
    Mutant("padding rows not cleared", "finish.h", "out[d] = 0;", ";", PADDING),
    Mutant(
        "slot past the cache written",
        "slots.h",
        "if (slot >= params.num_blocks * p.block_size) {",
        "if (slot > INT64_MAX - 1) {",
        WRITE,
    ),
    Mutant(
        "copy from a block out of range",
        "cache_ops.cu",
        "if (id >= 0 && id < region.num_blocks) return true;",
        "if (id >= 0) return true;",
        MOVE,
    ),
    Mutant("table change out of range", "cache_ops.cu", "index < 0 || index >= p.columns", "index < 0", UPDATE),
    Mutant(
        "missing barrier between tiles",
        "many_rows.h",
        "      device::sync_threads();  // what every thread copied",
        "      // ",
        TILES,
        "races",
    ),
    Mutant(
        "missing wait for a tile",
        "many_rows.h",
        "device::cp_async_wait<kStages - 2>();",
        "device::cp_async_wait<kStages - 1>();",
        TILES,
    ),
    Mutant(
        "wrong stage of a tile",
        "many_rows.h",
        "const int slot = tile % kStages;\n      uint32_t",
        "const int slot = (tile + 1) % kStages;\n      uint32_t",
        TILES,
    ),
    Mutant(
        "unmasked diagonal",
        "many_rows.h",
        "tile_key + kKeys <= warp.first_end",
        "tile_key + kKeys <= warp.last_end",
        TILES,
    ),
    Mutant(
        "unmasked far window edge",
        "many_rows.h",
        "tile_key >= warp.last_begin",
        "tile_key >= warp.first_begin",
        TILES_WINDOW,
    ),
    Mutant(
        "skipped window edge",
        "many_rows.h",
        "tile_key + kKeys <= warp.first_begin",
        "tile_key <= warp.first_begin",
        TILES_WINDOW,
    ),
    Mutant(
        "unmasked bad block",
        "many_rows.h",
        "all_visible = all_visible && valid[i] == ~0u",
        "(void)valid[i]",
        TILES_BLOCKS,
    ),
    Mutant(
        "arrivals of two items in one count", "attend.h", "if (!is_whole(s)) {", "if (pieces.lie_in_records()) {", FIXED
    ),
    Mutant("a fixed piece left out", "attend.h", "if (unit > 0 && !pieces", "if (unit > 1 && !pieces", FIXED),
    Mutant(
        "missing barrier before a fold",
        "attend.h",
        "    device::sync_threads();  // the piece is all there",
        "    // ",
        FIXED_RACES,
        "races",
    ),
    Mutant(
        "fixed pieces past their records", "spans.h", "s.item_begin + s.work.units <= plan.most_pieces", "true", FIXED
    ),
    Mutant(
        "NaN code decoded as 480",
        "codes.h",
        "(magnitude + 0x00800080u) & 0x40004000u",
        "0u & (magnitude + 0x00800080u)",
        CODES_NAN,
    ),
    Mutant(
        "reference of V not moved",
        "codes.h",
        "state.n[half] = reference[half];",
        "if (state.n[half] == -INFINITY) state.n[half] = reference[half];",
        CODES_GROWING,
    ),
    Mutant(
        "output not rescaled with V's reference",
        "codes.h",
        "power_of_two(state.n[half] - reference[half])",
        "1.0f + 0.0f * power_of_two(state.n[half] - reference[half])",
        CODES_GROWING,
    ),
    Mutant(
        "K scale of the next key",
        "codes.h",
        "query.scale[c / 2] * of_lane[i * 8 + c % 2]",
        "query.scale[c / 2] * of_lane[i * 8 + 1]",
        CODES,
    ),
    Mutant(
        "scale of an unwritten slot", "load.h", "scales.data + at, readable);", "scales.data + at, true);", CODES_UNSEEN
    ),
    Mutant(
        "queries not scaled to f16",
        "codes.h",
        "const uint32_t bounded = exponent < 16 ? 16 : exponent;",
        "const uint32_t bounded = exponent < 16 ? 16 : 142;",
        CODES_QUERIES,
    ),
    Mutant(
        "large tiles for a sequence that decodes",
        "paged_attention.cu",
        "rows >= kPrefillTile && !same",
        "rows >= kPrefillTile",
        BESIDE,
    ),
    Mutant("more query tokens than there are", "work.h", "len < p.num_tokens ? len : p.num_tokens", "len", STARTS),
    Mutant("padding before the first token", "finish.h", "end > 0 ? end : 0", "end", STARTS),
    Mutant("planner's cut without a record", "work.h", "int64_t{plan.grain} * weight : 1", "1 : 1", SMALL),
    Mutant("plan of another call", "spans.h", "if (header.made_for != params.plan.made_for)", "if (false)", OTHER_PLAN),
    Mutant(
        "plan of another call not flagged",
        "spans.h",
        "return report(params.attention.faults, DeviceFault::plan);",
        "return;",
        OTHER_PLAN,
    ),
    Mutant(
        "plan that says nothing of the mask",
        "paged_attention.cu",
        "p.causal, p.window, p.shared_tokens",
        "p.shared_tokens",
        OTHER_PLAN,
    ),
    Mutant(
        "plan that says nothing of shared tokens",
        "paged_attention.cu",
        "p.window, p.shared_tokens,",
        "p.window,",
        OTHER_CASCADE,
    ),
    Mutant(
        "plan that says nothing of the grid",
        "paged_attention.cu",
        "plan.grid, plan.few_tile",
        "plan.few_tile",
        OTHER_PLAN,
    ),
    Mutant(
        "a table's last block not seen",
        "spans.h",
        "p.max_blocks * p.block_size;",
        "(p.max_blocks - 1) * p.block_size;",
        NO_END,
    ),
    Mutant("no end at the table's", "spans.h", "if (s.work.end <= table_end) return;", "return;", NO_END),
    Mutant(
        "items past the plan's end",
        "plan.cu",
        "counted.all < plan.most_items ? counted.all : plan.most_items",
        "counted.all",
        PLAN_END,
    ),
    Mutant("starts that fall not flagged", "sequences.h", "end < start || ", "", FALLING),
    Mutant("starts past the tokens not flagged", "sequences.h", "end > p.num_tokens || ", "", SEQUENCES),
    Mutant("first start not looked at", "sequences.h", "first == 0 && p.query_start_loc[0] != 0", "false", SEQUENCES),
    Mutant("padding flagged", "sequences.h", "seq_len < 0", "seq_len < end - start", NO_FAULTS),
    Mutant(
        "memory without room for prompts",
        "paged_attention.cu",
        "if (possible.prefill) add(prefill_kernel_for(p));",
        "",
        MEMORY,
    ),
    Mutant("comparison by a scale's infinite inverse", "codes.h", "fabsf(scale) < 0x1p-126f ? 0.0f :", "", TINY),
    Mutant("weights lifted too little", "codes.h", "kMostLift = 126.0f", "kMostLift = 100.0f", TINY),
    Mutant("codes decoded in order", "codes.h", "shifted_codes(codes << 8)", "shifted_codes(codes << 16)", DECODED),
]
