// `gate_up` for many rows on Hopper (sm_90a): h = glu(x·Wgᵀ + bg, x·Wuᵀ + bu), both products and the gate in one kernel.
//
// A tile is 128 rows of x by 128 features of gate and the same 128 of up. The 256 rows of weights lie in shared memory as
// [gate 128 | up 128], so one wgmma m64n256k16 leaves gate of a feature in acc[i] and up of it in acc[64 + i] of one thread,
// and the gate is computed in registers. The weights need no repacking; they may be one packed matrix or two.
//
// Warpgroup 0 produces: one thread brings x and the weights by TMA, 64 k at a time, through a ring of 4 stages. Warpgroups 1
// and 2 consume, 64 rows each. `full[s]` completes when the bytes of stage s are there, `empty[s]` when every warpgroup that
// reads it is done. In a cluster of 2 along M rank 0 brings the gate half of the weights to both blocks and rank 1 the up half,
// so a stage is free when the consumers of both blocks say so. Blocks are persistent: tile after tile, in strips of 8 tile
// rows, so that a strip of x and the weights in flight stay in L2.
//
// By reckoning, not measurement: per k step a block needs 48 KiB (c1) or 32 KiB of its own reads (c2) for 512 clocks of
// wgmma, 96 or 64 B/clk; 4 stages hold 192 KiB in flight or in use. The epilogue, about 20 instructions for each of 64 pairs
// per thread, is not overlapped: some 2.5 thousand clocks after 65 thousand at H = 4096.
#include "hopper.cuh"

#include "activation.cuh"

namespace {

// ------------------------------------------------------------------------------------------------ sizes

constexpr int BM = 128, BN = 128, BK = 64, STAGES = 4, CONSUMERS = 2;
constexpr uint32_t X_BYTES = BM * BK * 2, HALF_BYTES = BN * BK * 2, STAGE_BYTES = X_BYTES + 2 * HALF_BYTES;  // 48 KiB
constexpr uint32_t BOX_BYTES = 64 * 64 * 2, OUT_BYTES = BM * BN * 2;                                        // boxes of h; 32 KiB
constexpr uint32_t SHARED = STAGES * STAGE_BYTES + OUT_BYTES + 1024 /* alignment */ + 256 /* barriers */;
static_assert(SHARED == 230656 && SHARED <= 232448, "the host's number; what a block may have");

// ------------------------------------------------------------------------------------------------ device maths

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  DEVICE void next() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Places {
  uint32_t stages, out, barriers;
  DEVICE explicit Places(const uint8_t* raw) {
    stages = (shared_address(raw) + 1023) & ~1023u;  // the swizzle is of addresses
    out = stages + STAGES * STAGE_BYTES;
    barriers = out + OUT_BYTES;
  }
  DEVICE uint32_t x(int stage) const { return stages + stage * STAGE_BYTES; }
  DEVICE uint32_t gate(int stage) const { return x(stage) + X_BYTES; }
  DEVICE uint32_t up(int stage) const { return gate(stage) + HALF_BYTES; }
  DEVICE uint32_t full(int stage) const { return barriers + 8 * stage; }
  DEVICE uint32_t empty(int stage) const { return barriers + 8 * (STAGES + stage); }
};

// The tiles of this block, first row and first feature of each.
template <int CLUSTER_SIZE> struct Tiles {
  int across, down, index;
  DEVICE Tiles(int M, int I)
      : across((I + BN - 1) / BN), down((M + BM * CLUSTER_SIZE - 1) / (BM * CLUSTER_SIZE)), index(blockIdx.x / CLUSTER_SIZE) {}
  DEVICE bool next(int rank, int& row, int& feature) {
    if (index >= across * down) return false;
    constexpr int STRIP = 8;
    const int strip = index / (STRIP * across), in_strip = index - strip * STRIP * across;
    const int height = min(STRIP, down - strip * STRIP);
    row = ((strip * STRIP + in_strip % height) * CLUSTER_SIZE + rank) * BM;
    feature = in_strip / height * BN;
    index += gridDim.x / CLUSTER_SIZE;
    return true;
  }
};

struct Maps {
  const TensorMap *x, *gate, *up, *h;
};

template <int CLUSTER_SIZE> DEVICE void load_stage(const Places& at, const Maps& maps, int stage, int rank, int k, int row, int feature) {
  const uint32_t full = at.full(stage);
  barrier_expect(full, STAGE_BYTES);
  tma_load(at.x(stage), maps.x, full, k, row);
  if constexpr (CLUSTER_SIZE == 1) {
    tma_load(at.gate(stage), maps.gate, full, k, feature);
    tma_load(at.up(stage), maps.up, full, k, feature);
  } else if (rank == 0) {
    tma_load_multicast(at.gate(stage), maps.gate, full, k, feature, 0b11);
  } else {
    tma_load_multicast(at.up(stage), maps.up, full, k, feature, 0b11);
  }
}

// sums = 64 rows of x · [gate | up]ᵀ over all of K; one wgmma group stays in flight.
template <typename T, int CLUSTER_SIZE>
DEVICE void accumulate(float (&sums)[128], const Places& at, Ring& ring, int consumer, int k_steps) {
  const int thread = threadIdx.x & 127;
  const auto release = [&](int stage) {
    if (thread < CLUSTER_SIZE) barrier_arrive(at.empty(stage), thread);
  };
  int previous = -1;
  for (int k = 0; k < k_steps; ++k) {
    barrier_wait(at.full(ring.stage), ring.phase);
    const uint64_t a = wgmma_operand(at.x(ring.stage) + consumer * (X_BYTES / CONSUMERS)), b = wgmma_operand(at.gate(ring.stage));
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < BK / 16; ++kk) wgmma_m64n256k16(T(), sums, a + 2 * kk, b + 2 * kk, (k | kk) != 0);
    wgmma_commit();
    wgmma_wait<1>();  // the group before this one is done with its stage
    if (previous >= 0) release(previous);
    previous = ring.stage;
    ring.next();
  }
  pin(sums);
  wgmma_wait<0>();
  pin(sums);
  release(previous);
}

template <typename T> struct Biases {
  const T *gate, *up;
  int I;
};

// This thread's pairs, of features first.., plus their biases.
template <typename T> DEVICE void add_biases(float (&sums)[128], const Biases<T>& bias, int first) {
#pragma unroll
  for (int i = 0; i < 64; i += 4)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = first + i * 2 + (threadIdx.x & 3) * 2 + e;
      if (feature < bias.I) {
        const float gate = bias.gate ? widen(bias.gate[feature]) : 0.0f, up = bias.up ? widen(bias.up[feature]) : 0.0f;
        sums[i + e] += gate, sums[i + 2 + e] += gate;
        sums[64 + i + e] += up, sums[64 + i + 2 + e] += up;
      }
      compiler_fence();  // or all loads would come first, and need registers
    }
}

// The gate of the 8 pairs (sums[I], sums[64 + I]).., features 16·c.. of the tile, -> 16 rows of shared memory: a box of
// (64, 64) for each half of the features, swizzled for TMA.
template <typename T, int I, typename Formula> DEVICE void put_columns(const float (&sums)[128], int c, uint32_t out, Formula formula) {
  const int lane = threadIdx.x & 31, row = ((threadIdx.x >> 5) & 3) * 16 + (lane & 15);
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = formula.value(sums[I + i], sums[64 + I + i]);
  const int piece = (c & 3) * 2 + (lane >> 4);  // 16 bytes of the 128 of a box's row
  const uint32_t address = out + (c >> 2) * BOX_BYTES + row * 128 + ((piece ^ (row & 7)) << 4);
  store_matrix_x4(address, pack2(T(), v[0], v[1]), pack2(T(), v[2], v[3]), pack2(T(), v[4], v[5]), pack2(T(), v[6], v[7]));
}

// Plain SwiGLU with everything unrolled. Any other formula in a loop that moves the sums down to where its body finds them,
// because registers cannot be indexed and fourteen unrolled copies would be a megabyte of code.
template <typename T> DEVICE void put_tile(float (&sums)[128], uint32_t out, const GluOp& op) {
  if (op.activation == SILU && is_plain(op)) {
    const Plain<float, Swish<float>> formula{{1.0f}};
    put_columns<T, 0>(sums, 0, out, formula);
    put_columns<T, 8>(sums, 1, out, formula);
    put_columns<T, 16>(sums, 2, out, formula);
    put_columns<T, 24>(sums, 3, out, formula);
    put_columns<T, 32>(sums, 4, out, formula);
    put_columns<T, 40>(sums, 5, out, formula);
    put_columns<T, 48>(sums, 6, out, formula);
    put_columns<T, 56>(sums, 7, out, formula);
    return;
  }
#pragma unroll 1
  for (int c = 0; c < 8; ++c) {
    with_formula<float>(op, [&](auto formula) { put_columns<T, 0>(sums, c, out, formula); });
#pragma unroll
    for (int i = 0; i < 56; ++i) {
      sums[i] = sums[i + 8];
      sums[64 + i] = sums[64 + i + 8];
    }
  }
}

template <typename T, int CLUSTER_SIZE>
DEVICE void produce(const Places& at, const Maps& maps, int rank, int M, int I, int H) {
  Tiles<CLUSTER_SIZE> tiles(M, I);
  Ring ring;
  for (int row, feature; tiles.next(rank, row, feature);)
    for (int k = 0; k < H; k += BK) {
      barrier_wait(at.empty(ring.stage), ring.phase ^ 1);
      load_stage<CLUSTER_SIZE>(at, maps, ring.stage, rank, k, row, feature);
      ring.next();
    }
}

template <typename T, int CLUSTER_SIZE>
DEVICE void consume(const Places& at, const Maps& maps, int rank, const Biases<T>& bias, int M, int I, int H, const GluOp& op) {
  const int consumer = (threadIdx.x >> 7) - 1;
  const bool leader = (threadIdx.x & 127) == 0;
  const uint32_t out = at.out + consumer * (OUT_BYTES / CONSUMERS);
  Tiles<CLUSTER_SIZE> tiles(M, I);
  Ring ring;
  for (int row, feature; tiles.next(rank, row, feature);) {
    float sums[128];
    accumulate<T, CLUSTER_SIZE>(sums, at, ring, consumer, (H + BK - 1) / BK);
    if (bias.gate || bias.up) add_biases(sums, bias, feature);
    // The last tile's store must have read `out` before it is written again.
    if (leader) tma_store_wait_read();
    sync_threads(1 + consumer, 128);
    put_tile<T>(sums, out, op);
    async_proxy_fence();
    sync_threads(1 + consumer, 128);
    if (leader) {
      tma_store(maps.h, out, feature, row + consumer * 64);
      tma_store(maps.h, out + BOX_BYTES, feature + 64, row + consumer * 64);
      tma_store_commit();
    }
  }
  if (leader) tma_store_wait();
}

template <typename T, int CLUSTER_SIZE>
DEVICE void gate_up(const Maps& maps, const T* b_gate, const T* b_up, int M, int I, int H, const GluOp& op) {
  SHARED_BYTES(raw);
  const Places at(raw);
  const int rank = int(cluster_rank());
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {maps.x, maps.gate, maps.up, maps.h}) tma_prefetch_map(map);
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(at.full(stage), 1);
      barrier_init(at.empty(stage), CONSUMERS * CLUSTER_SIZE);
    }
    barrier_init_fence();
  }
  sync_cluster();
  pdl_wait();
  pdl_launch();
  if (threadIdx.x < 128) {
    registers_down<40>();
    if (threadIdx.x == 0) produce<T, CLUSTER_SIZE>(at, maps, rank, M, I, H);
    sync_warp();  // the cluster barrier wants whole warps
  } else {
    registers_up<232>();
    consume<T, CLUSTER_SIZE>(at, maps, rank, Biases<T>{b_gate, b_up, I}, M, I, H, op);
    sync_warp();
  }
  // No block may leave while its partner can still write into it or arrive on its barriers.
  sync_cluster();
}

}  // namespace

// ------------------------------------------------------------------------------------------------ kernels

#define GATE_UP_SM90(T, N)                                                                                                   \
  extern "C" __global__ void CLUSTER(N) __launch_bounds__(384, 1) gate_up_sm90_##T##_c##N(                                   \
      const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w_gate, const GRID_CONSTANT TensorMap w_up,             \
      const GRID_CONSTANT TensorMap h, const T* b_gate, const T* b_up, int M, int I, int H, GluOp op) {                      \
    gate_up<T, N>(Maps{&x, &w_gate, &w_up, &h}, b_gate, b_up, M, I, H, op);                                                  \
  }

GATE_UP_SM90(bf16, 1)
GATE_UP_SM90(bf16, 2)
GATE_UP_SM90(f16, 1)
GATE_UP_SM90(f16, 2)
