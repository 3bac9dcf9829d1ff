// What the kernels need beyond plain C++: the dtypes, and instructions of sm_80 and later as
// functions. tests/cuda_emu/device.cuh declares the same names for the CPU. This file must not
// depend on any kernel.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__
#define SHARED(type, name) __shared__ type name
#define SHARED_BYTES(name) extern __shared__ __align__(1024) uint8_t name[]

using bf16 = __nv_bfloat16;
using f16 = __half;

// ----------------------------------------------------------------------------------- dtypes

// The type in which elements of T are computed, and the rounding back to T.
template <typename T> struct Number {
  using Real = T;
  static DEVICE T narrow(T v) { return v; }
};
template <> struct Number<bf16> {
  using Real = float;
  static DEVICE bf16 narrow(float v) { return __float2bfloat16_rn(v); }
};
template <> struct Number<f16> {
  using Real = float;
  static DEVICE f16 narrow(float v) { return __float2half_rn(v); }
};
template <typename T> using Real = typename Number<T>::Real;

DEVICE float widen(bf16 v) { return __bfloat162float(v); }
DEVICE float widen(f16 v) { return __half2float(v); }
DEVICE float widen(float v) { return v; }
DEVICE double widen(double v) { return v; }

// Two rounded values in one register, the first in the low half.
DEVICE uint32_t pack2(bf16, float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
DEVICE uint32_t pack2(f16, float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// 1/x within 1 ulp, for x in [1, 32], without a slow path. f64: correctly rounded.
DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE double reciprocal(double x) { return 1.0 / x; }

// ----------------------------------------------------------------------------------- memory

// Weights are read once, so the load bypasses L1. It fetches 128 bytes at a time into L2 (an H200
// is 3 % slower with 256, 17 % slower with 64). Only for memory that no kernel in flight writes
// (.nc).
DEVICE uint4 load16_weights(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// Activations: through L1, coherent, because the previous kernel may have written them while this
// kernel was already resident.
DEVICE uint4 load16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
DEVICE void store16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }
DEVICE bool on16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// The compiler moves no memory access across this.
DEVICE void compiler_fence() { asm volatile("" ::: "memory"); }

// ------------------------------------------------------------ programmatic dependent launch

// After this call everything that the previous kernels of the stream wrote is complete and visible,
// and they read nothing more. Every thread calls it before its first load of an activation and
// before its first store. A kernel that did not wait could end before its predecessor, and would
// release its successor too early.
DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start its prologue when SMs have room. It is called after pdl_wait, so at
// most two kernels overlap.
DEVICE void pdl_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------ warps

DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }

// d (16,8) += a (16,16) · b (16,8), f32 sums. With lane = 4g + t, register halves in order: a0, a2:
// row g, k = 2t.. and 8+2t..; a1, a3: row g+8; b0, b1: column g, the same k; d: (g, 2t), (g, 2t+1),
// (g+8, 2t), (g+8, 2t+1).
DEVICE void mma_m16n8k16(bf16, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_m16n8k16(f16, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
