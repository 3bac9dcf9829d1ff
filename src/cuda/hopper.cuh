// Hopper's asynchronous instructions (mbarrier, TMA, wgmma, clusters) as functions, sm_90a only.
// tests/cuda_emu/hopper.cuh declares the same names for the CPU. Addresses of shared memory are
// 32-bit addresses in the .shared window.
#pragma once
#include <cuda.h>

#include "device.cuh"

#define GRID_CONSTANT __grid_constant__
#define CLUSTER(n) __cluster_dims__(n, 1, 1)
using TensorMap = CUtensorMap;

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// --------------------------------------------------------------------------------- mbarrier

DEVICE void barrier_init(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// Makes this thread's barriers visible to the cluster and to TMA. A cluster barrier must follow.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and adds `bytes` to the bytes that TMA must deliver before the phase completes.
DEVICE void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is complete. On a fresh barrier the phase of parity 1 counts
// as complete.
DEVICE void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
               ::"r"(bar), "r"(parity) : "memory");
}
// Arrives on the barrier at the same address in block `rank` of the cluster, for a buffer that only
// wgmma has read. Waiting for the wgmma already orders the reads, so the plain form suffices;
// release.cluster would cost a fence of all memory in every k step.
DEVICE void barrier_arrive(uint32_t bar, uint32_t rank) {
  asm volatile("{\n.reg .b32 r;\nmapa.shared::cluster.u32 r, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [r];\n}"
               ::"r"(bar), "r"(rank) : "memory");
}

// -------------------------------------------------------------------------------------- TMA

DEVICE void tma_prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies the box at (column, row) to this block's shared memory; its bytes count on `bar`. Elements
// outside of the matrix become 0.
DEVICE void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(dst), "l"(map), "r"(bar), "r"(column), "r"(row) : "memory");
}
// The same, to the blocks of the cluster in `mask`, at the same address in each.
DEVICE void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar, int column, int row, uint16_t mask) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4}], [%2], %5;"
               ::"r"(dst), "l"(map), "r"(bar), "r"(column), "r"(row), "h"(mask) : "memory");
}
// Copies shared memory to the box at (column, row). Nothing outside of the matrix is written.
DEVICE void tma_store(const TensorMap* map, uint32_t src, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(src), "r"(column), "r"(row) : "memory");
}
DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The first waits until this thread's stores have read their shared memory, the second until they
// have written global memory.
DEVICE void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Orders this thread's ordinary writes to shared memory before later reads by TMA.
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Stores four 8x8 matrices of 16-bit elements. Lanes 8i..8i+7 supply the row addresses of matrix i;
// each lane supplies two elements of every matrix.
DEVICE void store_matrix_x4(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1), "r"(m2), "r"(m3) : "memory");
}

// ---------------------------------------------------------------------- blocks and clusters

DEVICE uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE void sync_threads(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
template <int N> DEVICE void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// ------------------------------------------------------------------------------------ wgmma

// Called before the first wgmma of a group: earlier accesses to the accumulators are complete.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups of this warpgroup are in flight.
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// A K-major operand in shared memory: rows of 128 bytes, swizzled as by TMA's SWIZZLE_128B, and
// groups of 8 rows 1024 bytes apart. The next 16 k are 32 bytes further: + 2.
DEVICE uint64_t wgmma_operand(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Keeps the compiler from moving uses of the accumulators across a wait.
template <int N> DEVICE void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC16(i) ACC4(i), ACC4(i + 4), ACC4(i + 8), ACC4(i + 12)
#define ACC64 ACC16(0), ACC16(16), ACC16(32), ACC16(48)
#define ACC80 ACC64, ACC16(64)
#define ACC96 ACC80, ACC16(80)
#define ACC112 ACC96, ACC16(96)
#define ACC128 ACC112, ACC16(112)
#define D64                                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                        \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                        \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D80 D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define D96 D80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define D112 D96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define D128 D112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA(N, SUMS, DTYPE, A, B, P)                                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                             \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." DTYPE "." DTYPE " {" D##SUMS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}"\
               : ACC##SUMS : "l"(a), "l"(b), "r"(accumulate))

// d (64,N) = a (64,16) · b (N,16)ᵀ, plus d if `accumulate`. N is twice the number of a thread's
// sums. Warp w of the warpgroup computes rows 16w to 16w + 15. With lane = 4g + t, d[4i], d[4i+1]
// are (g, 8i + 2t), (g, 8i + 2t + 1), and d[4i+2], d[4i+3] the same columns of row g + 8.
DEVICE void wgmma_k16(bf16, float (&d)[64], uint64_t a, uint64_t b, int accumulate) { WGMMA(128, 64, "bf16", 64, 65, 66); }
DEVICE void wgmma_k16(bf16, float (&d)[80], uint64_t a, uint64_t b, int accumulate) { WGMMA(160, 80, "bf16", 80, 81, 82); }
DEVICE void wgmma_k16(bf16, float (&d)[96], uint64_t a, uint64_t b, int accumulate) { WGMMA(192, 96, "bf16", 96, 97, 98); }
DEVICE void wgmma_k16(bf16, float (&d)[112], uint64_t a, uint64_t b, int accumulate) { WGMMA(224, 112, "bf16", 112, 113, 114); }
DEVICE void wgmma_k16(bf16, float (&d)[128], uint64_t a, uint64_t b, int accumulate) { WGMMA(256, 128, "bf16", 128, 129, 130); }
DEVICE void wgmma_k16(f16, float (&d)[64], uint64_t a, uint64_t b, int accumulate) { WGMMA(128, 64, "f16", 64, 65, 66); }
DEVICE void wgmma_k16(f16, float (&d)[80], uint64_t a, uint64_t b, int accumulate) { WGMMA(160, 80, "f16", 80, 81, 82); }
DEVICE void wgmma_k16(f16, float (&d)[96], uint64_t a, uint64_t b, int accumulate) { WGMMA(192, 96, "f16", 96, 97, 98); }
DEVICE void wgmma_k16(f16, float (&d)[112], uint64_t a, uint64_t b, int accumulate) { WGMMA(224, 112, "f16", 112, 113, 114); }
DEVICE void wgmma_k16(f16, float (&d)[128], uint64_t a, uint64_t b, int accumulate) { WGMMA(256, 128, "f16", 128, 129, 130); }
