// src/cuda/hopper.cuh for the CPU: the same names with the same meaning. TMA copies and wgmma
// happen at a time that the emulator's seed determines (cuda_emu.h). Ordinary writes to shared
// memory become visible to TMA only through async_proxy_fence.
#pragma once
#include "device.cuh"

#define GRID_CONSTANT
#define CLUSTER(n)

// Row-major, 16-bit elements. Boxes of 64 columns have the 128-byte swizzle, others have none.
struct TensorMap {
  void* data;
  uint64_t columns, rows;
  uint32_t box_columns, box_rows;
};

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const uint8_t*>(p) - emu::self->block->dynamic.data()) + emu::WINDOW;
}

// --------------------------------------------------------------------------------- mbarrier

inline void barrier_init(uint32_t bar, uint32_t arrivals) {
  if (bar % 8) emu::fault("mbarrier not on 8 bytes");
  emu::self->block->at(bar, 8);
  emu::self->block->mbarriers[bar] = {int(arrivals), int(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint32_t bar, uint32_t bytes) { emu::self->block->arrive(bar, bytes); }
inline void barrier_wait(uint32_t bar, uint32_t parity) {
  const emu::MBarrier& b = emu::self->block->mbarrier(bar);
  emu::wait_until([&] { return b.phase != parity; });
}
inline void barrier_arrive(uint32_t bar, uint32_t rank) { emu::self->block->cluster->blocks.at(rank)->arrive(bar, 0); }

// -------------------------------------------------------------------------------------- TMA

// Exclusive-or of bits 4..6 of an address with bits 7..9.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// Calls each(element of the matrix or null, address in shared memory) for every element of a box.
template <typename Each> void for_box(const TensorMap& map, uint32_t shared, int column, int row, Each each) {
  const bool swizzled = map.box_columns == 64;
  if (shared % (swizzled ? 1024 : 128)) emu::fault("a TMA box not on 1024 bytes, or 128 without swizzle");
  for (uint32_t i = 0; i < map.box_rows; ++i)
    for (uint32_t j = 0; j < map.box_columns; ++j) {
      const uint64_t c = uint64_t(int64_t(column) + j), r = uint64_t(int64_t(row) + i);
      uint16_t* const data = static_cast<uint16_t*>(map.data);
      const uint32_t address = shared + (i * map.box_columns + j) * 2;
      each(c < map.columns && r < map.rows ? data + r * map.columns + c : nullptr, swizzled ? swizzle(address) : address);
    }
}

inline void tma_prefetch_map(const TensorMap*) {}
inline void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar, int column, int row, uint16_t mask) {
  emu::Cluster* const cluster = emu::self->block->cluster;
  for (size_t rank = 0; rank < cluster->blocks.size(); ++rank)
    if (mask >> rank & 1)
      emu::begin([block = cluster->blocks[rank].get(), map = *map, dst, bar, column, row] {
        for_box(map, dst, column, row, [&](const uint16_t* element, uint32_t address) {
          const uint16_t v = element ? *element : 0;
          memcpy(block->at(address, 2), &v, 2);
        });
        emu::MBarrier& b = block->mbarrier(bar);
        b.bytes -= long(map.box_rows) * map.box_columns * 2;
        block->flip(b);
      });
}
inline void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, int column, int row) {
  tma_load_multicast(dst, map, bar, column, row, uint16_t(1u << emu::self->block->rank));
}
inline void tma_store(const TensorMap* map, uint32_t src, int column, int row) {
  emu::self->stores.push_back(emu::begin([block = emu::self->block, map = *map, src, column, row] {
    for_box(map, src, column, row, [&](uint16_t* element, uint32_t address) {
      if (element) memcpy(element, block->at(address, 2), 2);
    });
  }));
}
inline void tma_store_commit() {}
inline void tma_store_wait() {
  for (const size_t id : emu::self->stores) emu::finish(id);
  emu::self->stores.clear();
}
inline void tma_store_wait_read() { tma_store_wait(); }
inline void async_proxy_fence() {
  for (const auto& [address, word] : emu::self->unfenced) memcpy(emu::self->block->at(address, 4), &word, 4);
  emu::self->unfenced.clear();
}

inline void store_matrix_x4(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  if (row % 16) emu::fault("stmatrix row not on 16 bytes");
  const uint32_t words[5] = {row, m0, m1, m2, m3};
  emu::warp_exchange(words, 5, [&](const auto* lanes) {
    const int lane = emu::self->lane;
    for (int m = 0; m < 4; ++m) emu::self->unfenced.emplace_back(lanes[m * 8 + lane / 4][0] + lane % 4 * 4, words[1 + m]);
  });
}

// ---------------------------------------------------------------------- blocks and clusters

inline uint32_t cluster_rank() { return uint32_t(emu::self->block->rank); }
inline void sync_cluster() { emu::arrive_and_wait(emu::self->block->cluster->all); }
inline void sync_threads(int barrier, int threads) { emu::named_barrier(barrier, threads); }
inline void sync_warpgroup() { emu::named_barrier(100 + emu::self->index.x / 128, 128); }
template <int N> void registers_down() { sync_warpgroup(); }
template <int N> void registers_up() { sync_warpgroup(); }

// ------------------------------------------------------------------------------------ wgmma

inline void wgmma_fence() { sync_warpgroup(); }
inline void wgmma_commit() {
  emu::self->groups.push_back(std::move(emu::self->open_group));
  emu::self->open_group.clear();
}
// The four warps wait together, because wgmma is an operation of the warpgroup.
template <int N> void wgmma_wait() {
  sync_warpgroup();
  auto& groups = emu::self->groups;
  while (groups.size() > N) {
    for (const emu::Effect& effect : groups.front()) effect();
    groups.erase(groups.begin());
  }
  sync_warpgroup();
}
template <int N> void pin(float (&)[N]) {}

inline uint64_t wgmma_operand(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Element k of row r, located by the fields of the descriptor.
template <typename T> float operand_at(emu::Block* block, uint64_t operand, int r, int k) {
  const uint32_t start = uint32_t(operand & 0x3FFF) << 4, group = uint32_t(operand >> 32 & 0x3FFF) << 4;
  T v;
  memcpy(&v, block->at(swizzle(start + r / 8 * group + r % 8 * 128 + k * 2), 2), 2);
  return widen(v);
}

// Computes this thread's SUMS sums of the (64, 2·SUMS) product.
template <typename T, int SUMS> void multiply(emu::Block* block, int thread, float (&d)[SUMS], uint64_t a, uint64_t b, bool accumulate) {
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  float rows[2][16];
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) rows[h][k] = operand_at<T>(block, a, warp * 16 + g + h * 8, k);
  for (int i = 0; i < SUMS / 2; ++i) {
    float column[16];
    for (int k = 0; k < 16; ++k) column[k] = operand_at<T>(block, b, i / 2 * 8 + t * 2 + i % 2, k);
    for (int h = 0; h < 2; ++h) {
      float& sum = d[i / 2 * 4 + h * 2 + i % 2];
      if (!accumulate) sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += rows[h][k] * column[k];
    }
  }
}

template <typename T, int SUMS> void wgmma_k16(T, float (&d)[SUMS], uint64_t a, uint64_t b, int accumulate) {
  const auto product = [block = emu::self->block, thread = emu::self->index.x & 127, &d, a, b, accumulate] {
    multiply<T>(block, thread, d, a, b, accumulate);
  };
  if (emu::machine.timing == emu::Timing::AT_ONCE) product();
  else emu::self->open_group.push_back(product);
}
