// Threads as coroutines on one core, in random order, with copies and wgmmas that complete at random.
//
// How late they complete, and which warps hardly run, changes every few thousand steps: a race often needs one party
// to be far ahead. When nothing moves, one of the operations in flight completes; when there is nothing, it is a
// deadlock.
#pragma once
#include <memory>

#include "tensor_core.h"

static_assert(sizeof(void*) == 8, "x86-64");
extern "C" void switch_stack(void** save, void* to);
// The registers that a call preserves; a new stack holds six of them and a return address.
asm(R"(
.globl switch_stack
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

static void* scheduler_stack;
static Thread* running;
static KernelFunction entry;

static void yield() { switch_stack(&running->stack_pointer, scheduler_stack); }

static void thread_main() {
  Thread& T = *running;
  entry(T);
  if (T.warpgroup->completed < T.warpgroup->issued) fail(T, "exit with a wgmma in flight");
  T.done = true;
  T.cta->live--;
  machine.progress++;
  for (;;) yield();
}

constexpr size_t kStackBytes = 96 * 1024;  // translated kernels keep thousands of registers there

struct Grid {
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<char[]>> stacks;

  Grid(uint32_t ctas_wanted, uint32_t cluster_size, uint32_t block, uint32_t shared_bytes) {
    for (uint32_t c = 0; c < ctas_wanted; ++c) {
      if (c % cluster_size == 0) {
        clusters.push_back(std::make_unique<Cluster>());
        clusters.back()->threads = cluster_size * block;
        clusters.back()->size = cluster_size;
      }
      ctas.push_back(std::make_unique<Cta>());
      Cta* const cta = ctas.back().get();
      cta->shared.assign(shared_base + shared_bytes, 0xFF);
      cta->mbarriers.resize(cta->shared.size() / 8 + 1);
      cta->index = c;
      cta->rank = c % cluster_size;
      cta->threads = cta->live = block;
      cta->cluster = clusters.back().get();
      cta->cluster->ctas.push_back(cta);
      for (uint32_t t = 0; t < block; ++t) add_thread(cta, t);
    }
  }

  void add_thread(Cta* cta, uint32_t tid) {
    if (tid % 32 == 0) warps.push_back(std::make_unique<Warp>());
    if (tid % 128 == 0) {
      warpgroups.push_back(std::make_unique<Warpgroup>());
      cta->warpgroups.push_back(warpgroups.back().get());
    }
    threads.push_back(std::make_unique<Thread>());
    stacks.push_back(std::unique_ptr<char[]>(new char[kStackBytes]));
    Thread& T = *threads.back();
    T.cta = cta;
    T.tid = tid;
    T.lane = tid % 32;
    T.cta_index = cta->index;
    T.cta_rank = cta->rank;
    T.cluster_ctas = cta->cluster->size;
    T.block_threads = cta->threads;
    T.warp = warps.back().get();
    T.warpgroup = warpgroups.back().get();
    auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uint64_t>(stacks.back().get()) + kStackBytes) & ~15ull);
    *--top = 0;  // the return address of thread_main: the stack is aligned as after a call
    *--top = reinterpret_cast<uint64_t>(&thread_main);
    for (int i = 0; i < 6; ++i) *--top = 0;
    T.stack_pointer = top;
  }
};

static std::string describe_deadlock(std::vector<Thread*> const& live) {
  std::map<std::string, int> waiting;
  for (Thread* T : live) {
    char text[120];
    snprintf(text, sizeof text, "cta %u warp %u: %s %x", T->cta->index, T->tid / 32,
             T->waits_for ? T->waits_for : "running", T->waits_at);
    waiting[text]++;
  }
  std::string report = "deadlock";
  for (auto const& [text, count] : waiting) report += " | " + text + " (" + std::to_string(count) + ")";
  return report;
}

struct Scheduler {
  Grid& grid;
  std::vector<Thread*> live;
  uint32_t copy_delay = 100, wgmma_delay = 100;
  uint64_t tick = 0, idle = 0, last_progress = 0, stuck = 0;
  uint64_t prior_grid_ends = 200 + machine.random() % 20000;

  explicit Scheduler(Grid& g) : grid(g) {
    for (auto& thread : g.threads) live.push_back(thread.get());
  }

  void run() {
    while (!live.empty() && machine.error.empty()) {
      if (tick++ % 4096 == 0) change_pace();
      if (!machine.prior_grid_done && tick > prior_grid_ends) end_prior_grid();
      if (!machine.copies.empty() && machine.random() % copy_delay == 0)
        finish_copy(machine.random() % machine.copies.size());
      if (machine.random() % wgmma_delay == 0) {
        Warpgroup* const group = machine.warpgroups[machine.random() % machine.warpgroups.size()];
        if (!group->queue.empty()) finish_wgmma(group);
      }
      step(machine.random() % live.size());
      if (machine.progress != last_progress)
        idle = stuck = 0;
      else if (++idle > 4 * live.size() + 200)
        push();
      last_progress = machine.progress;
    }
  }

  void step(size_t which) {
    Thread* const thread = live[which];
    if (thread->warp->slow && machine.random() % 64) return;
    running = thread;
    switch_stack(&scheduler_stack, thread->stack_pointer);
    running = nullptr;
    if (!thread->done) return;
    live[which] = live.back();
    live.pop_back();
  }

  void change_pace() {
    constexpr uint32_t kDelays[] = {2, 20, 200, 5000};
    copy_delay = kDelays[machine.random() % 4];
    wgmma_delay = kDelays[machine.random() % 4];
    bool const some_slow = machine.random() % 2;
    for (auto& warp : grid.warps) warp->slow = some_slow && machine.random() % 4 == 0;
  }

  void end_prior_grid() {
    machine.prior_grid_done = true;
    machine.progress++;
  }

  // A kernel that looks at the clock gets to see an hour pass; for others, or if that does not end it, a deadlock.
  void give_up() {
    if (!machine.timed || machine.late) {
      machine.error = describe_deadlock(live);
      return;
    }
    machine.late = true;
    machine.clock += 3600ull * 1000 * 1000 * 1000;
    machine.progress++;
  }

  // Nothing has moved for long enough to have asked every thread: let something complete.
  void push() {
    uint64_t const before = machine.progress;
    idle = 0;
    for (auto& warp : grid.warps) warp->slow = false;
    if (!machine.copies.empty()) {
      finish_copy(machine.random() % machine.copies.size());
    } else {
      for (Warpgroup* group : machine.warpgroups)
        if (!group->queue.empty()) {
          finish_wgmma(group);
          break;
        }
    }
    if (machine.progress == before && !machine.prior_grid_done) end_prior_grid();
    if (machine.progress != before)
      stuck = 0;
    else if (++stuck > 30 && machine.error.empty())
      give_up();
  }
};
