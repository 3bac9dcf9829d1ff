// Runs the kernels of src/cuda on the CPU: blocks, warps, shared memory and barriers, one fiber per
// CUDA thread.
//
// Everything runs in one OS thread. A fiber runs until it must wait; the scheduler then selects the
// next fiber that can continue. The seed of the launch determines whether the order is rising,
// falling or random. In random order some warps also sleep for a while. A missing barrier therefore
// shows in some order, and every run is reproducible. Shared memory is filled with NaN before a
// block. Clusters (or single blocks) run one after another in random order; the blocks of a cluster
// run together. An operation that is asynchronous on the GPU is an `Effect`. By the seed it happens
// at once, at the last possible moment, or at a random one. When no fiber can continue, a
// dependency on the previous kernel (pdl_wait) is fulfilled; if there is none, that is a deadlock.
//
// The emulator checks indices, alignment, layouts of fragments, counts of barriers, the order of
// accesses to shared memory, and accesses before the previous kernel is done. It does not model
// registers, caches, timing, or the memory model between blocks.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace emu {

[[noreturn]] inline void fault(const char* what) {
  printf("FAULT %s\n", what);
  fflush(stdout);
  _Exit(3);
}

struct Dim {
  int x = 0, y = 0, z = 0;
};

enum class Order { RISING, FALLING, RANDOM };
enum class Timing { AT_ONCE, LAST_MOMENT, RANDOM };

// ----------------------------------------------------------------------------------- blocks

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

// Counts arrivals and bytes. A phase completes when all of both have arrived.
struct MBarrier {
  int count = 0, pending = 0;
  long bytes = 0;
  uint32_t phase = 0;
};

constexpr uint32_t WINDOW = 1024 + 16;  // address of the first byte of dynamic shared memory: on 16 bytes, not on 1024

struct Cluster;
struct Block {
  Dim index;
  int rank;
  Cluster* cluster;
  std::vector<uint8_t> dynamic;
  std::map<const void*, std::vector<uint8_t>> by_type;  // static shared memory: one object of each type
  Barrier all;
  std::vector<Barrier> warps;
  std::map<int, Barrier> named;
  std::map<uint32_t, MBarrier> mbarriers;
  std::vector<std::array<uint32_t, 8>> exchange;  // by thread

  uint8_t* at(uint32_t address, size_t bytes) {
    if (address < WINDOW || address + bytes > WINDOW + dynamic.size()) fault("shared memory address out of bounds");
    return dynamic.data() + (address - WINDOW);
  }
  void flip(MBarrier& b) {
    if (b.pending == 0 && b.bytes == 0) {
      b.phase ^= 1;
      b.pending = b.count;
    }
  }
  void arrive(uint32_t address, long bytes) {
    MBarrier& b = mbarrier(address);
    b.bytes += bytes;
    if (--b.pending < 0) fault("more arrivals on an mbarrier than it counts");
    flip(b);
  }
  MBarrier& mbarrier(uint32_t address) {
    const auto found = mbarriers.find(address);
    if (found == mbarriers.end()) fault("no mbarrier at this address");
    return found->second;
  }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier all;
};

// ----------------------------------------------------------------------------------- fibers

using Effect = std::function<void()>;

struct Thread {
  Dim index;
  Block* block = nullptr;
  int warp = 0, lane = 0;
  bool done = false, waited = false;
  // While the thread is blocked: the condition under which it continues.
  bool (*ready)(const void*) = nullptr;
  const void* condition = nullptr;
  bool for_dependency = false;
  std::vector<std::vector<Effect>> groups;  // committed groups of wgmma, oldest first
  std::vector<Effect> open_group;
  std::vector<std::pair<uint32_t, uint32_t>> unfenced;  // words written to shared memory that TMA cannot see yet
  std::vector<size_t> stores;                          // ids of TMA stores not waited for
  jmp_buf context;
  ucontext_t start;
  bool started = false;
};

struct Machine {
  Dim block_dim, grid_dim;
  std::mt19937 random;
  Order order = Order::RISING;
  Timing timing = Timing::AT_ONCE;
  std::function<void()> kernel;
  std::function<void(bool)> previous;
  std::vector<std::unique_ptr<Thread>> threads;
  std::map<size_t, Effect> in_flight;  // TMA, by id
  size_t next_id = 0;
  jmp_buf scheduler;
  bool dependency_met = false;
  unsigned rounds = 0, nap = 16;
  std::vector<bool> asleep;  // by warp of the cluster
};
inline Machine machine;
inline Thread* self = nullptr;

constexpr size_t STACK = 96 << 10;
inline std::vector<std::unique_ptr<char[]>> stacks;

inline void leave() { _longjmp(machine.scheduler, 1); }

inline void fiber_main() {
  machine.kernel();
  self->done = true;
  leave();
}

template <typename Ready> void wait_until(const Ready& ready) {
  while (!ready()) {
    self->ready = [](const void* p) { return (*static_cast<const Ready*>(p))(); };
    self->condition = &ready;
    if (!_setjmp(self->context)) leave();
  }
  self->ready = nullptr;
}

inline void arrive_and_wait(Barrier& b) {
  const unsigned generation = b.generation;
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    if (b.expected > 32) machine.rounds = 0;  // some warps oversleep here
    ++b.generation;
  } else {
    wait_until([&] { return b.generation != generation; });
  }
}

// --------------------------------------------------------------------- asynchronous effects

// Starts an effect. Its id is in flight until the effect has happened.
inline size_t begin(Effect effect) {
  const size_t id = machine.next_id++;
  if (machine.timing == Timing::AT_ONCE) effect();
  else machine.in_flight.emplace(id, std::move(effect));
  return id;
}
inline void finish(size_t id) {
  const auto found = machine.in_flight.find(id);
  if (found == machine.in_flight.end()) return;
  const Effect effect = std::move(found->second);
  machine.in_flight.erase(found);
  effect();
}
// Lets some effects happen, each with probability `p`, in any order. With `force`, at least one.
inline bool some_effects(double p, bool force) {
  std::vector<size_t> ids;
  for (const auto& entry : machine.in_flight) ids.push_back(entry.first);
  std::shuffle(ids.begin(), ids.end(), machine.random);
  bool any = false;
  for (const size_t id : ids)
    if ((force && !any) || std::uniform_real_distribution<>()(machine.random) < p) {
      finish(id);
      any = true;
    }
  return any;
}

// -------------------------------------------------------------------------------- scheduler

inline void resume(Thread& thread, size_t slot) {
  self = &thread;
  if (_setjmp(machine.scheduler)) return;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  while (stacks.size() <= slot) stacks.push_back(std::make_unique<char[]>(STACK));
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stacks[slot].get();
  thread.start.uc_stack.ss_size = STACK;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, fiber_main, 0);
  setcontext(&thread.start);
}

// Selects the warps that sleep, anew every 16 or 64 rounds, by the seed.
inline void put_to_sleep() {
  machine.asleep.resize(machine.threads.size() / 32 + 1);
  if (machine.rounds++ % machine.nap) return;
  for (size_t warp = 0; warp < machine.asleep.size(); ++warp) machine.asleep[warp] = machine.random() % 5 < 2;
}
inline bool wake_all() {
  bool any = false;
  for (const bool asleep : machine.asleep) any |= asleep;
  machine.asleep.assign(machine.asleep.size(), false);
  return any;
}

inline bool round_of_threads(std::vector<size_t>& order) {
  if (machine.order == Order::RANDOM) {
    std::shuffle(order.begin(), order.end(), machine.random);
    put_to_sleep();
  }
  bool progress = false;
  for (const size_t slot : order) {
    Thread& thread = *machine.threads[slot];
    if (machine.order == Order::RANDOM && machine.asleep[slot / 32]) continue;
    if (thread.done || (thread.ready && !thread.ready(thread.condition))) continue;
    resume(thread, slot);
    progress = true;
    if (machine.timing == Timing::RANDOM && !machine.in_flight.empty()) some_effects(0.05, false);
  }
  return progress;
}

inline bool meet_dependency() {
  bool waiting = false;
  for (const auto& thread : machine.threads) waiting |= !thread->done && thread->for_dependency;
  if (!waiting || machine.dependency_met) return false;
  if (machine.previous) machine.previous(true);
  machine.dependency_met = true;
  return true;
}

inline void run_cluster(Cluster& cluster) {
  machine.dependency_met = false;
  machine.asleep.clear();
  if (machine.previous) machine.previous(false);
  std::vector<size_t> order(machine.threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = machine.order == Order::FALLING ? order.size() - 1 - i : i;
  const auto all_done = [] {
    return std::all_of(machine.threads.begin(), machine.threads.end(), [](const auto& t) { return t->done; });
  };
  while (!all_done())
    if (!round_of_threads(order) && !wake_all() && !some_effects(0.3, true) && !meet_dependency()) fault("deadlock");
  if (!machine.in_flight.empty()) fault("a block ended with a copy in flight");
  for (const auto& thread : machine.threads) {
    if (!thread->groups.empty() || !thread->open_group.empty()) fault("a block ended with a wgmma in flight");
    if (!thread->stores.empty()) fault("a block ended without waiting for its TMA stores");
    if (!thread->waited) fault("a thread ended without pdl_wait");
  }
  for (const auto& block : cluster.blocks)
    if (block->all.arrived) fault("a block ended inside a barrier");
}

inline std::unique_ptr<Block> make_block(Cluster& cluster, int index, int rank, int threads, size_t dynamic) {
  auto block = std::make_unique<Block>();
  block->index.x = index;
  block->rank = rank;
  block->cluster = &cluster;
  block->dynamic.assign(dynamic, 0xff);
  block->all.expected = threads;
  block->warps.resize((threads + 31) / 32);
  for (Barrier& warp : block->warps) warp.expected = 32;
  block->exchange.resize(threads);
  return block;
}

// Sets the choices of a launch by its seed.
inline void choose(unsigned seed) {
  machine.random.seed(seed);
  machine.order = std::array{Order::RISING, Order::FALLING, Order::RANDOM}[seed % 3];
  machine.nap = seed / 9 % 2 ? 64 : 16;
  machine.timing = std::array{Timing::AT_ONCE, Timing::LAST_MOMENT, Timing::RANDOM}[seed / 3 % 3];
}

// Calls previous(false) before each cluster, when nothing of the previous kernel is done, and
// previous(true) when all of it is.
inline void launch(int grid, int threads, int cluster_size, size_t dynamic, unsigned seed, std::function<void()> kernel,
                   std::function<void(bool)> previous = {}) {
  choose(seed);
  machine.block_dim = {threads, 1, 1};
  machine.grid_dim = {grid, 1, 1};
  machine.kernel = std::move(kernel);
  machine.previous = std::move(previous);
  std::vector<int> clusters(grid / cluster_size);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = int(i);
  std::shuffle(clusters.begin(), clusters.end(), machine.random);
  for (const int first : clusters) {
    Cluster cluster;
    cluster.all.expected = threads * cluster_size;
    machine.threads.clear();
    for (int rank = 0; rank < cluster_size; ++rank) {
      cluster.blocks.push_back(make_block(cluster, first * cluster_size + rank, rank, threads, dynamic));
      for (int i = 0; i < threads; ++i) {
        auto thread = std::make_unique<Thread>();
        thread->index.x = i;
        thread->block = cluster.blocks.back().get();
        thread->warp = i / 32;
        thread->lane = i % 32;
        machine.threads.push_back(std::move(thread));
      }
    }
    run_cluster(cluster);
  }
}

// ------------------------------------------------------------ for device.cuh and hopper.cuh

template <typename T> T& static_shared() {
  static const char key = 0;
  auto& bytes = self->block->by_type[&key];
  if (bytes.empty()) bytes.assign(sizeof(T), 0xff);
  return *reinterpret_cast<T*>(bytes.data());
}

// Every lane supplies n words. Then f is called with the words of all lanes of the warp.
template <typename F> void warp_exchange(const uint32_t* words, int n, F f) {
  Block& block = *self->block;
  const int warp = self->warp;
  memcpy(block.exchange[self->index.x].data(), words, n * 4);
  arrive_and_wait(block.warps[warp]);
  f(&block.exchange[warp * 32]);
  arrive_and_wait(block.warps[warp]);
}

inline void named_barrier(int id, int threads) {
  Barrier& b = self->block->named[id];
  if (b.expected && b.expected != threads) fault("one named barrier, two numbers of threads");
  b.expected = threads;
  arrive_and_wait(b);
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fault("misaligned access");
}

}  // namespace emu

// -------------------------------------------------------------------- the words of CUDA C++

#define __global__
#define __launch_bounds__(...)
#define threadIdx (emu::self->index)
#define blockIdx (emu::self->block->index)
#define blockDim (emu::machine.block_dim)
#define gridDim (emu::machine.grid_dim)
using std::max;
using std::min;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
