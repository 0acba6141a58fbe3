// The machine's entry points for Python: run one launch, then ask what it did.
#include "schedule.h"

namespace {

struct Launch {  // cases.py has the same fields
  uint32_t grid, cluster, block, shared_bytes, shared_base, preempt;
  uint64_t seed;
  uint8_t* parameters;
  uint64_t const* buffers;  // base, bytes, flags
  uint64_t buffer_count;
};

KernelFunction find(char const* name) {
  for (KernelEntry const* e = kernel_table; e->name; ++e)
    if (!strcmp(e->name, name)) return e->run;
  return nullptr;
}

void check_the_end(Grid const& grid) {
  if (machine.error.empty() && !machine.copies.empty()) machine.error = "a copy is in flight at the end";
  for (auto const& cta : grid.ctas)
    for (Mbarrier const& barrier : cta->mbarriers)
      if (machine.error.empty() && barrier.bytes) machine.error = "an mbarrier still expects bytes at the end";
}

}  // namespace

// What went wrong, or an empty string.
extern "C" char const* emulate(char const* name, Launch const* launch) {
  machine = Machine{};
  machine.random_state = launch->seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 10; ++i) machine.random();
  machine.preempt = launch->preempt;
  shared_base = launch->shared_base;
  parameters = reinterpret_cast<uint64_t>(launch->parameters);
  fill_e4m3_table();
  for (uint64_t i = 0; i < launch->buffer_count; ++i) {
    uint64_t const* const b = launch->buffers + 3 * i;
    machine.buffers.push_back({b[0], b[1], b[2], std::vector<bool>(b[2] & kWriteOnce ? b[1] : 0)});
  }
  entry = find(name);
  if (!entry) return "no such kernel";
  if (launch->grid % launch->cluster) return "the grid is not a multiple of the cluster";
  if (launch->shared_bytes > 227 * 1024) return "too much shared memory";
  Grid grid(launch->grid, launch->cluster, launch->block, launch->shared_bytes);
  for (auto& group : grid.warpgroups) machine.warpgroups.push_back(group.get());
  Scheduler(grid).run();
  check_the_end(grid);
  return machine.error.c_str();
}

extern "C" uint64_t copies_done() { return machine.copied; }
extern "C" uint64_t wgmmas_done() { return machine.multiplied; }
