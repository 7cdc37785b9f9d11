"""Bugs to plant in the kernels and below them, and the builds that must report each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ELEMENTS = "csrc/cuda/elements.cuh"
SUMS = "csrc/cuda/sums.cuh"
PARTS = "csrc/cuda/parts.cuh"
GATE = "csrc/cuda/gate.cuh"
WEIGHT_GRADS = "csrc/cuda/weight_grads.cuh"
STREAMING = "csrc/cuda/streaming.cuh"
RESIDENT = "csrc/cuda/resident.cuh"
PLAN = "csrc/cuda/plan.cpp"
SIMT = "tests/simt/emulated_simt.h"

# Words of the reports.
WRONG = "wrong result: "
RACE = "ThreadSanitizer: data race"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
# The threads of a block went different ways. The order decides which of them meet.
APART = r"(divergent barriers|exit before a barrier): block \d+: "


@dataclass(frozen=True)
class Bug:
    """`old` must occur exactly `count` times in the file: a change of the kernels can't quietly
    turn the bug into none."""

    name: str
    file: str
    old: str
    new: str
    cases: str  # arguments of the case program that reach the bug
    found: dict[str, str]  # build -> words of its report
    count: int = 1
    quick: bool = False

    def planted(self, root: Path) -> str:
        """The file's text with the bug."""
        text = (root / self.file).read_text()
        occurs = text.count(self.old)
        assert occurs == self.count, f"{self.name}: {self.file} holds it {occurs} times"
        return text.replace(self.old, self.new)

    def plant(self, root: Path) -> None:
        (root / self.file).write_text(self.planted(root))


BUGS = [
    # ---- order: barriers, arrivals, flags, copies ----
    Bug(
        "no_barrier_after_the_fetch",
        RESIDENT,
        "  simt::copy_async_wait();\n  barrier();\n",
        "  simt::copy_async_wait();\n",
        "--mode resident chunks/",
        {"native": WRONG, "tsan": RACE},
    ),
    Bug(
        "no_wait_for_the_copies",
        RESIDENT,
        "  simt::copy_async_wait();\n",
        "",
        "--mode resident vectors/",
        {"native": "a copy_async16 that was not waited for"},
        quick=True,
    ),
    Bug(
        "no_barrier_before_the_arrival",
        ELEMENTS,
        "  barrier();\n  if (thread_id() == 0) {\n    message->last",
        "  if (thread_id() == 0) {\n    message->last",
        "--mode streaming per_branch/",
        {"tsan": RACE},
    ),
    Bug(
        "no_barrier_before_the_arrival_of_a_sample",
        ELEMENTS,
        "    barrier();\n    if (thread_id() == 0) {\n      message->last",
        "    if (thread_id() == 0) {\n      message->last",
        "--mode streaming per_branch/",
        {"native": APART, "tsan": RACE},
    ),
    Bug(
        "no_barrier_before_the_ticket_is_read",
        STREAMING,
        "    barrier();\n    const unsigned long long ticket",
        "    const unsigned long long ticket",
        "--mode streaming odd/",
        {"native": APART, "tsan": RACE},
    ),
    Bug(
        "no_barrier_before_meet_is_used_again",
        PARTS,
        "    barrier();\n  }\n}\n\n// Sums x, or x * y, over the rows of a segment",
        "  }\n}\n\n// Sums x, or x * y, over the rows of a segment",
        "--mode streaming wide/",
        {"native": WRONG, "tsan": RACE},
    ),
    Bug(
        "relaxed_arrival",
        SIMT,
        "__atomic_fetch_add(counter, Counter(1), __ATOMIC_ACQ_REL)",
        "__atomic_fetch_add(counter, Counter(1), __ATOMIC_RELAXED)",
        "--mode streaming odd/",
        {"tsan": RACE},
        quick=True,
    ),
    Bug(
        "groups_arrive_without_release",
        WEIGHT_GRADS,
        "  if (groups > 1 && p.groups_arrived[0].last_to_arrive(groups, message)) {\n",
        """\
  bool last = false;
  if (groups > 1) {
    barrier();
    if (thread_id() == 0) {
      const auto held = __atomic_fetch_add(&p.groups_arrived[0].held, 1ull, __ATOMIC_RELAXED);
      message->last = LaunchCounter::arrivals(held) == groups - 1;
    }
    barrier();
    last = message->last;
  }
  if (last) {
""",
        "--mode cluster2 odd/f32/contiguous/backward",
        {"tsan": RACE},
    ),
    Bug(
        "ready_without_acquire",
        SIMT,
        "__atomic_load_n(flag, __ATOMIC_ACQUIRE)",
        "__atomic_load_n(flag, __ATOMIC_RELAXED)",
        "--mode streaming odd/",
        {"tsan": RACE},
    ),
    Bug(
        "ready_by_the_read_that_orders_nothing",
        STREAMING,
        "while (!simt::is_published(&p.ready[n])) {",
        "while (!simt::is_set(&p.ready[n])) {",
        "--mode streaming odd/",
        {"tsan": RACE},
    ),
    Bug(
        "ready_before_the_gate",
        STREAMING,
        "        gate<T>(p, pooled, row_of",
        "        set_ready(p, n);\n        gate<T>(p, pooled, row_of",
        "--mode streaming odd/",
        {"native": WRONG, "tsan": RACE},
    ),
    Bug(
        "no_wait_for_ready",
        STREAMING,
        "        wait_ready(p, n);\n",
        "",
        "--mode streaming odd/",
        {"native": WRONG, "tsan": RACE},
        count=2,
    ),
    Bug(
        "no_cluster_barrier_before_peers_are_read",
        RESIDENT,
        "  simt::cluster_arrive();\n  simt::cluster_wait();\n  const Split",
        "  const Split",
        "--mode cluster2 odd/",
        {"native": "cluster_peer before any cluster barrier"},
    ),
    Bug(
        "exit_while_peers_read",
        RESIDENT,
        "  if (p.cluster > 1) {\n    simt::cluster_wait();\n  }\n",
        "",
        "--mode cluster2 odd/",
        {"native": "exit between cluster_arrive and cluster_wait"},
    ),
    # ---- progress ----
    Bug(
        "tickets_by_block_number",
        STREAMING,
        """\
  for (;;) {
    if (thread_id() == 0) {
      message->ticket = simt::next_ticket(p.ticket);
""",
        """\
  for (unsigned long long own = simt::block_id();; own += 5) {
    if (thread_id() == 0) {
      message->ticket = own;
""",
        "--mode streaming odd/",
        {"native": "livelock: "},
        quick=True,
    ),
    Bug(
        "reweight_before_pool",
        STREAMING,
        "      n += j < pools ? p.lag : 0;\n",
        "      n += p.lag;\n      j = j < reweights ? pools + j : j - reweights;\n",
        "--mode streaming odd/",
        {"native": "livelock: "},
    ),
    # ---- which part, which element ----
    Bug(
        "wrong_owner_of_a_plane",
        RESIDENT,
        "part_of(split, i / split.planes)",
        "i / split.planes % p.cluster",
        "--mode cluster2 odd/",
        {"native": WRONG},
        quick=True,
    ),
    Bug(
        "last_plane_of_a_part_left_out",
        PARTS,
        "plane + 1 : part_begin(split, part + 1);\n",
        "plane + 1 : part_begin(split, part + 1) - 1;\n",
        "--mode streaming odd/",
        {"native": WRONG},
    ),
    Bug(
        "one_element_too_many",
        PARTS,
        "turns_of(at, rows * pixels, step)",
        "turns_of(at, rows * pixels + 1, step)",
        "--mode streaming odd/",
        {"native": WRONG, "asan": OVERFLOW},
    ),
    Bug(
        "last_row_of_weight_sums_left_out",
        WEIGHT_GRADS,
        "const bool there = row + k < last_row;",
        "const bool there = row + k < last_row - 1;",
        "--mode streaming odd/",
        {"native": WRONG},
    ),
    Bug(
        "last_row_of_bias_sums_left_out",
        WEIGHT_GRADS,
        "sum_terms<A, 8>(first, last, [&]",
        "sum_terms<A, 8>(first, last - 1, [&]",
        "--mode streaming batch_of_17/",
        {"native": WRONG},
    ),
    Bug(
        "hidden_units_beyond_whole_chunks_left_out",
        WEIGHT_GRADS,
        "const int chunks = (r + kUnits - 1) / kUnits;",
        "const int chunks = r / kUnits;",
        "--mode resident vectors/",
        {"native": WRONG},
    ),
    Bug(
        "no_barrier_after_a_group_is_copied",
        WEIGHT_GRADS,
        "  simt::copy_async_wait();\n  barrier();\n",
        "  simt::copy_async_wait();\n",
        "--mode resident vectors/",
        {"native": f"{WRONG}|not the bits of the first run", "tsan": RACE},
    ),
    Bug(  # more vectors than the maps' room holds
        "a_group_copied_beyond_the_room",
        WEIGHT_GRADS,
        "int64_t{2} * samples * (vector + units) > room || ",
        "",
        "--mode auto one_pixel/",
        {"native": "copy_async16 to outside of the block's shared memory"},
    ),
    Bug(
        "one_sample_summed_before_it_is_written",
        WEIGHT_GRADS,
        "    barrier();  // nothing else to wait for\n",
        "    ;\n",
        "--mode resident one_sample/",
        {"native": f"{WRONG}|changed before its wait", "tsan": RACE},
    ),
    Bug(
        "two_samples_without_an_arrival",
        WEIGHT_GRADS,
        "if (p.samples == 1) {",
        "if (p.samples <= 2) {",
        "--mode resident stage4/",
        {"tsan": RACE},
    ),
    Bug(
        "lanes_that_share_a_short_row_not_added_up",
        SUMS,
        "        lanes);\n    if (row < rows && lane == 0) {",
        "        1);\n    if (row < rows && lane == 0) {",
        "--mode resident vectors/",
        {"native": WRONG},
    ),
    Bug(
        "terms_that_lanes_share_rounded_down",
        SUMS,
        "const int run = (count + lanes - 1) / lanes;",
        "const int run = count / lanes;",
        "--mode resident batch_of_17/",
        {"native": WRONG},
    ),
    Bug(
        "lanes_of_a_warp_take_different_turns",
        SUMS,
        """\
  for (int first = 0; first < elements; first += step) {
    const int i = first + thread_id() / lanes;
""",
        """\
  for (int i = thread_id() / lanes; i < elements; i += step) {
""",
        "--mode resident odd/",
        {"native": APART},
    ),
    Bug(
        "last_turn_left_out",
        SUMS,
        "static_cast<unsigned>(end - first + step - 1)",
        "static_cast<unsigned>(end - first)",
        "--mode resident odd/",
        {"native": WRONG},
    ),
    Bug(
        "a_part_skipped_by_the_reversed_order",
        STREAMING,
        "reweight(n, reweights - 1 - (j - pools));",
        "reweight(n, reweights - (j - pools));",
        "--mode streaming odd/",
        {"native": WRONG},
    ),
    Bug(
        "stride_of_the_first_map",
        PARTS,
        "maps.pixel_stride[deal.s]",
        "maps.pixel_stride[0]",
        "--mode streaming gaps/",
        {"native": WRONG},
    ),
    Bug(  # the last of the case's maps has the largest stride, which leads out of the others
        "stride_of_the_last_map",
        PARTS,
        "maps.pixel_stride[deal.s]",
        "maps.pixel_stride[3]",
        "--mode streaming gaps/",
        {"asan": OVERFLOW},
    ),
    Bug(
        "vectors_where_nothing_is_aligned",
        PLAN,
        "plan.vector = p.aligned ? full_vector(p.dtype) : 1;",
        "plan.vector = full_vector(p.dtype);",
        "--mode streaming sliced/",
        {"asan": "runtime error: .*misaligned address"},
        count=2,
    ),
    # ---- memory of the plan ----
    Bug(
        "shared_memory_one_vector_too_small",
        PLAN,
        "return piece + meet + 4 * vector + hidden;",
        "return piece + meet + 3 * vector + hidden;",
        "--mode resident odd/",
        {"asan": OVERFLOW},
    ),
    Bug(
        "room_for_one_of_two_pieces",
        PLAN,
        "      plan.pieces * round_up(piece_elements(p",
        "      round_up(piece_elements(p",
        "--mode resident odd/f32/contiguous/backward",
        {"asan": OVERFLOW},
    ),
    Bug(
        "counters_of_streaming_not_cleared",
        PLAN,
        "  w.cleared = next;\n",
        "  w.cleared = w.ready;\n",
        "--mode streaming odd/",
        {"native": WRONG, "tsan": RACE},
    ),
    # ---- counters that nobody clears ----
    Bug(
        "counters_that_no_block_begins",
        WEIGHT_GRADS,
        "if (p.samples > 1) {\n    p.groups",
        "if (p.samples > 1 << 20) {\n    p.groups",
        "--mode cluster2 odd/f32/contiguous/backward",
        {"native": WRONG},
        quick=True,
    ),
    Bug(
        "counter_of_the_groups_not_begun",
        WEIGHT_GRADS,
        "    p.groups_arrived[0].begin(p.launch);\n",
        "    ;\n",
        "--mode cluster2 batch_of_17/",
        {"native": WRONG},
    ),
    Bug(
        "a_counter_begun_by_every_block",
        ELEMENTS,
        "if (before >> kArrivalBits != launch) {",
        "if (before != launch << kArrivalBits) {",
        "--mode cluster2 odd/f32/contiguous/backward",
        {"native": WRONG},
    ),
    Bug(
        "a_counter_of_another_launch_goes_on",
        ELEMENTS,
        "if (before >> kArrivalBits != launch) {",
        "if (before >> (kArrivalBits + 1) != launch >> 1) {",
        "--mode cluster2 batch_of_17/",
        {"native": WRONG},
    ),
    Bug(
        "every_launch_has_the_same_number",
        PLAN,
        "params.launch = new_launch_number();",
        "params.launch = 1;",
        "--mode cluster2 odd/f32/contiguous/backward",
        {"native": WRONG},
    ),
    Bug(  # it may lose the arrival of a block that came between
        "a_counter_replaced_whatever_it_holds",
        ELEMENTS,
        "simt::replace(&held, before, launch << kArrivalBits);",
        "held = launch << kArrivalBits;",
        "--mode cluster2 odd/",
        {"tsan": RACE},
    ),
    Bug(
        "counters_left_for_the_next_replay",
        ELEMENTS,
        "      if (message->last) {\n        held = 0;\n      }\n",
        "",
        "--mode replay odd/f32",
        {"native": WRONG},
        quick=True,
    ),
    # ---- the epilogue ----
    Bug(
        "scale_in_the_order_of_the_branches",
        GATE,
        "slot_of_branch(i / p.channels, p.branches, p.reversed)",
        "i / p.channels",
        "--mode resident epilogue_uneven/",
        {"native": WRONG},
        quick=True,
    ),
    Bug(
        "shift_before_the_product",
        PARTS,
        "const A y = multiply_add(x, mul, add);",
        "const A y = kBecome == Become::epilogue ? (x + add) * mul : multiply_add(x, mul, add);",
        "--mode resident epilogue_uneven/",
        {"native": WRONG},
    ),
    Bug(
        "no_relu",
        PARTS,
        "kBecome == Become::epilogue && with_relu ? relu(y) : y",
        "y",
        "--mode streaming relu_alone/",
        {"native": WRONG},
    ),
    Bug(
        "no_barrier_after_the_factors",
        GATE,
        "A(0);\n  }\n  barrier();\n}\n\n// da [S, C]",
        "A(0);\n  }\n}\n\n// da [S, C]",
        "--mode resident epilogue_uneven/",
        {"native": WRONG, "tsan": RACE},
    ),
    Bug(
        "summands_without_memory",
        PLAN,
        "take(streaming && p.epilogue, vectors)",
        "take(false, vectors)",
        "--mode streaming epilogue_uneven/",
        {"asan": OVERFLOW},
    ),
    # ---- maths ----
    Bug(
        "relu_passes_every_gradient",
        GATE,
        "grad_u[k] = relu_grad(sum, hidden[k]);",
        "grad_u[k] = sum;",
        "--mode resident batch_of_17/",
        {"native": WRONG},
    ),
    Bug(
        "pooled_gradient_not_divided",
        GATE,
        "grad_pooled[i] = sum / static_cast<A>(p.pixels);",
        "grad_pooled[i] = sum;",
        "--mode resident odd/",
        {"native": WRONG},
    ),
    Bug(
        "sums_of_the_last_group_left_out",
        WEIGHT_GRADS,
        "        if (first + k < groups) {",
        "        if (first + k < groups - 1) {",
        "--mode resident odd/",
        {"native": WRONG},
    ),
]


BY_NAME = {bug.name: bug for bug in BUGS}
