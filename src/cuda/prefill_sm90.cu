// `gate_up` on Hopper (sm_90a) for any number of rows: h = glu(x·Wgᵀ + bg, x·Wuᵀ + bu), both
// products and the gate in one kernel.
//
// A tile is 128 rows of x by W features of gate and the same W of up. Shared memory holds its 2W
// rows of weights as [gate W | up W]. One wgmma m64n2Wk16 thus leaves gate of a feature in acc[i]
// and up of it in acc[W/2 + i] of the same thread, and the gate is computed in registers. The
// weights need no repacking; they may be one matrix or two. The host chooses the W whose tiles
// divide best among the multiprocessors. The number of tiles of the busiest multiprocessor decides,
// for few rows too, because one multiprocessor reads memory at about its share of the bandwidth and
// no faster (24 GB/s of an H100's 3.1 TB/s).
//
// Warpgroup 0 is the producer: one thread loads x and the weights by TMA, 64 k at a time, into a
// ring of 4 to 6 stages. Warpgroups 1 and 2 are the consumers, 64 rows each. `full[s]` completes
// when all bytes of stage s have arrived, `empty[s]` when every warpgroup that reads it is done. In
// a cluster of 2 along M, rank 0 loads the gate half of the weights for both blocks and rank 1 the
// up half. A stage is therefore free when the consumers of both blocks have released it. Blocks are
// persistent. They process tiles in strips of 8 tile rows, so that a strip of x and the weights in
// flight stay in L2. The first stages of weights are loaded before pdl_wait.
//
// W = 128: per k step a block reads 48 KiB (c1), or 32 KiB of its own (c2), for 1024 clocks of
// wgmma; 4 stages hold 192 KiB in flight or in use. Measured on an H100 with M = 4096, H = 4096, I
// = 14336: 1.89 M clocks, of which wgmma alone needs 1.84 M. Beyond that its power limit is the
// bound.
#include "hopper.cuh"

#include "activation.cuh"

namespace {

// ------------------------------------------------------------------------------------ sizes

constexpr int BM = 128, BK = 64, CONSUMERS = 2;
constexpr uint32_t X_BYTES = BM * BK * 2;
// Sizes of tiles of W features, W a multiple of 16.
template <int W> struct Size {
  static constexpr int STAGES = W <= 64 ? 6 : W <= 96 ? 5 : 4;
  static constexpr uint32_t HALF_BYTES = W * BK * 2, STAGE_BYTES = X_BYTES + 2 * HALF_BYTES;  // W = 128: 48 KiB
  // h is stored in boxes of 64 rows by 64 features, or by 16 where 64 does not divide W.
  static constexpr int BOX = W % 64 == 0 ? 64 : 16;
  static constexpr uint32_t BOX_BYTES = 64 * BOX * 2, OUT_BYTES = BM * W * 2;
  static constexpr uint32_t SHARED = STAGES * STAGE_BYTES + OUT_BYTES + 1024 /* alignment */ + 256 /* barriers */;
};
// The host assumes these numbers. A block can have 232448 bytes.
static_assert(Size<64>::SHARED == 214272 && Size<80>::SHARED == 206080 && Size<96>::SHARED == 230656 && Size<112>::SHARED == 210176 &&
              Size<128>::SHARED == 230656 && Size<128>::SHARED <= 232448);

// ----------------------------------------------------------------------------- device maths

template <int W> struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  DEVICE void next() {
    if (++stage == Size<W>::STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <int W> struct Places : Size<W> {
  using S = Size<W>;
  uint32_t stages, out, barriers;
  DEVICE explicit Places(const uint8_t* raw) {
    stages = (shared_address(raw) + 1023) & ~1023u;  // the swizzle is of addresses
    out = stages + S::STAGES * S::STAGE_BYTES;
    barriers = out + S::OUT_BYTES;
  }
  DEVICE uint32_t x(int stage) const { return stages + stage * S::STAGE_BYTES; }
  DEVICE uint32_t gate(int stage) const { return x(stage) + X_BYTES; }
  DEVICE uint32_t up(int stage) const { return gate(stage) + S::HALF_BYTES; }
  DEVICE uint32_t full(int stage) const { return barriers + 8 * stage; }
  DEVICE uint32_t empty(int stage) const { return barriers + 8 * (S::STAGES + stage); }
};

// Iterates over the tiles of this block: the first row and the first feature of each.
template <int W, int CLUSTER_SIZE> struct Tiles {
  int across, down, index;
  DEVICE Tiles(int M, int I)
      : across((I + W - 1) / W), down((M + BM * CLUSTER_SIZE - 1) / (BM * CLUSTER_SIZE)), index(blockIdx.x / CLUSTER_SIZE) {}
  DEVICE bool next(int rank, int& row, int& feature) {
    if (index >= across * down) return false;
    constexpr int STRIP = 8;
    const int strip = index / (STRIP * across), in_strip = index - strip * STRIP * across;
    const int height = min(STRIP, down - strip * STRIP);
    row = ((strip * STRIP + in_strip % height) * CLUSTER_SIZE + rank) * BM;
    feature = in_strip / height * W;
    index += gridDim.x / CLUSTER_SIZE;
    return true;
  }
};

struct Maps {
  const TensorMap *x, *gate, *up, *h;
};

template <int W, int CLUSTER_SIZE>
DEVICE void load_weights(const Places<W>& at, const Maps& maps, int stage, int rank, int k, int feature) {
  const uint32_t full = at.full(stage);
  barrier_expect(full, Size<W>::STAGE_BYTES);
  if constexpr (CLUSTER_SIZE == 1) {
    tma_load(at.gate(stage), maps.gate, full, k, feature);
    tma_load(at.up(stage), maps.up, full, k, feature);
  } else if (rank == 0) {
    tma_load_multicast(at.gate(stage), maps.gate, full, k, feature, 0b11);
  } else {
    tma_load_multicast(at.up(stage), maps.up, full, k, feature, 0b11);
  }
}

// sums = 64 rows of x · [gate | up]ᵀ over all of K. One wgmma group stays in flight.
template <typename T, int W, int CLUSTER_SIZE>
DEVICE void accumulate(float (&sums)[W], const Places<W>& at, Ring<W>& ring, int consumer, int k_steps) {
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
    for (int kk = 0; kk < BK / 16; ++kk) wgmma_k16(T(), sums, a + 2 * kk, b + 2 * kk, (k | kk) != 0);
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

// Adds the biases to this thread's pairs, whose features start at `first`.
template <int W, typename T> DEVICE void add_biases(float (&sums)[W], const Biases<T>& bias, int first) {
#pragma unroll
  for (int i = 0; i < W / 2; i += 4)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = first + i * 2 + (threadIdx.x & 3) * 2 + e;
      if (feature < bias.I) {
        const float gate = bias.gate ? widen(bias.gate[feature]) : 0.0f, up = bias.up ? widen(bias.up[feature]) : 0.0f;
        sums[i + e] += gate, sums[i + 2 + e] += gate;
        sums[W / 2 + i + e] += up, sums[W / 2 + i + 2 + e] += up;
      }
      compiler_fence();  // or all loads would come first, and need registers
    }
}

// Applies the gate to the 8 pairs that start at (sums[FIRST], sums[W/2 + FIRST]), features 16·c..
// of the tile, and writes 16 rows of shared memory in the layout of the TMA store: rows are
// swizzled in a box of 64 features and contiguous in a box of 16.
template <typename T, int FIRST, int W, typename Formula> DEVICE void put_columns(const float (&sums)[W], int c, uint32_t out, Formula formula) {
  using S = Size<W>;
  const int lane = threadIdx.x & 31, row = ((threadIdx.x >> 5) & 3) * 16 + (lane & 15);
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = formula.value(sums[FIRST + i], sums[W / 2 + FIRST + i]);
  constexpr int PER_BOX = S::BOX / 16;
  const int piece = c % PER_BOX * 2 + (lane >> 4);  // 16 bytes of a box's row
  const uint32_t address = out + c / PER_BOX * S::BOX_BYTES + row * S::BOX * 2 + ((PER_BOX == 1 ? piece : piece ^ (row & 7)) << 4);
  store_matrix_x4(address, pack2(T(), v[0], v[1]), pack2(T(), v[2], v[3]), pack2(T(), v[4], v[5]), pack2(T(), v[6], v[7]));
}

template <typename T, int C, int W, typename Formula> DEVICE void put_all(const float (&sums)[W], uint32_t out, Formula formula) {
  if constexpr (C < W / 16) {
    put_columns<T, 8 * C>(sums, C, out, formula);
    put_all<T, C + 1>(sums, out, formula);
  }
}

// Plain SwiGLU is fully unrolled. Any other formula runs in a loop that moves the sums down to the
// registers its body uses: registers cannot be indexed, and fourteen unrolled copies would be a
// megabyte of code.
template <typename T, int W> DEVICE void put_tile(float (&sums)[W], uint32_t out, const GluParams& op) {
  if (op.activation == SILU && is_plain(op)) {
    put_all<T, 0>(sums, out, Plain<float, Swish<float>>{{1.0f}});
    return;
  }
#pragma unroll 1
  for (int c = 0; c < W / 16; ++c) {
    with_formula<float>(op, [&](auto formula) { put_columns<T, 0>(sums, c, out, formula); });
#pragma unroll
    for (int i = 0; i < W / 2 - 8; ++i) {
      sums[i] = sums[i + 8];
      sums[W / 2 + i] = sums[W / 2 + i + 8];
    }
  }
}

// The producer's position: its tile, and its k there.
template <int W, int CLUSTER_SIZE> struct Place {
  Tiles<W, CLUSTER_SIZE> tiles;
  int rank, H, row = 0, feature = 0, k = 0;
  bool more;
  DEVICE Place(int rank, int M, int I, int H) : tiles(M, I), rank(rank), H(H) { more = tiles.next(rank, row, feature); }
  DEVICE void next() {
    k += BK;
    if (k >= H) {
      k = 0;
      more = tiles.next(rank, row, feature);
    }
  }
};

template <int W, int CLUSTER_SIZE>
DEVICE void produce(const Places<W>& at, const Maps& maps, int rank, int M, int I, int H, bool leader) {
  constexpr int STAGES = Size<W>::STAGES;
  Place<W, CLUSTER_SIZE> weights(rank, M, I, H), x(rank, M, I, H);
  const auto bring_weights = [&](int stage) {
    load_weights<W, CLUSTER_SIZE>(at, maps, stage, rank, weights.k, weights.feature);
    weights.next();
  };
  const auto bring_x = [&](int stage) {
    tma_load(at.x(stage), maps.x, at.full(stage), x.k, x.row);
    x.next();
  };
  int ahead = 0;
  if (leader)
    for (; ahead < STAGES && weights.more; ++ahead) bring_weights(ahead);
  pdl_wait();
  pdl_launch();
  if (!leader) return;
  for (int stage = 0; stage < ahead; ++stage) bring_x(stage);
  for (Ring<W> ring{0, 1}; weights.more; ring.next()) {
    barrier_wait(at.empty(ring.stage), ring.phase ^ 1);
    bring_weights(ring.stage);
    bring_x(ring.stage);
  }
}

template <typename T, int W, int CLUSTER_SIZE>
DEVICE void consume(const Places<W>& at, const Maps& maps, int rank, const Biases<T>& bias, int M, int I, int H, const GluParams& op) {
  const int consumer = (threadIdx.x >> 7) - 1;
  const bool leader = (threadIdx.x & 127) == 0;
  using S = Size<W>;
  const uint32_t out = at.out + consumer * (S::OUT_BYTES / CONSUMERS);
  Tiles<W, CLUSTER_SIZE> tiles(M, I);
  Ring<W> ring;
  for (int row, feature; tiles.next(rank, row, feature);) {
    float sums[W];
    accumulate<T, W, CLUSTER_SIZE>(sums, at, ring, consumer, (H + BK - 1) / BK);
    if (bias.gate || bias.up) add_biases(sums, bias, feature);
    // The store of the previous tile must have read `out` before it is overwritten.
    if (leader) tma_store_wait_read();
    sync_threads(1 + consumer, 128);
    put_tile<T>(sums, out, op);
    async_proxy_fence();
    sync_threads(1 + consumer, 128);
    if (leader) {
      for (int box = 0; box < W / S::BOX; ++box)
        tma_store(maps.h, out + box * S::BOX_BYTES, feature + box * S::BOX, row + consumer * 64);
      tma_store_commit();
    }
  }
  if (leader) tma_store_wait();
}

template <typename T, int W, int CLUSTER_SIZE>
DEVICE void gate_up(const Maps& maps, const T* b_gate, const T* b_up, int M, int I, int H, const GluParams& op) {
  SHARED_BYTES(raw);
  const Places<W> at(raw);
  const int rank = int(cluster_rank());
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {maps.x, maps.gate, maps.up, maps.h}) tma_prefetch_map(map);
    for (int stage = 0; stage < Size<W>::STAGES; ++stage) {
      barrier_init(at.full(stage), 1);
      barrier_init(at.empty(stage), CONSUMERS * CLUSTER_SIZE);
    }
    barrier_init_fence();
  }
  sync_cluster();
  if (threadIdx.x < 128) {
    registers_down<40>();
    produce<W, CLUSTER_SIZE>(at, maps, rank, M, I, H, threadIdx.x == 0);
    sync_warp();  // the cluster barrier wants whole warps
  } else {
    registers_up<232>();
    pdl_wait();
    pdl_launch();
    consume<T, W, CLUSTER_SIZE>(at, maps, rank, Biases<T>{b_gate, b_up, I}, M, I, H, op);
    sync_warp();
  }
  // A block must not exit while its partner can still write to it or arrive on its barriers.
  sync_cluster();
}

}  // namespace

// ---------------------------------------------------------------------------------- kernels

#define GATE_UP_SM90(T, N, W)                                                                                                \
  extern "C" __global__ void CLUSTER(N) __launch_bounds__(384, 1) gate_up_sm90_##T##_c##N##_w##W(                            \
      const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w_gate, const GRID_CONSTANT TensorMap w_up,             \
      const GRID_CONSTANT TensorMap h, const T* b_gate, const T* b_up, int M, int I, int H, GluParams op) {                      \
    gate_up<T, W, N>(Maps{&x, &w_gate, &w_up, &h}, b_gate, b_up, M, I, H, op);                                               \
  }
#define GATE_UP_SM90_WIDTHS(T) \
  GATE_UP_SM90(T, 1, 64)        \
  GATE_UP_SM90(T, 1, 80)        \
  GATE_UP_SM90(T, 1, 96)        \
  GATE_UP_SM90(T, 1, 112)       \
  GATE_UP_SM90(T, 1, 128)       \
  GATE_UP_SM90(T, 2, 96)        \
  GATE_UP_SM90(T, 2, 112)       \
  GATE_UP_SM90(T, 2, 128)

GATE_UP_SM90_WIDTHS(bf16)
GATE_UP_SM90_WIDTHS(f16)
