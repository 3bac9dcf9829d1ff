// src/cuda/device.cuh for the CPU: the same names with the same meaning.
#pragma once
#include <cmath>

#include "cuda_emu.h"

#define DEVICE inline
#define SHARED(type, name) auto& name = emu::static_shared<type>()
#define SHARED_BYTES(name) const uint8_t* const name = emu::self->block->dynamic.data()

// ----------------------------------------------------------------------------------- dtypes

struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    bits = v != v ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);  // to nearest even, as __float2bfloat16_rn
  }
};
struct f16 {
  _Float16 v;
  f16() = default;
  explicit f16(float v) : v(_Float16(v)) {}
};

inline float widen(bf16 v) {
  const uint32_t u = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float widen(f16 v) { return float(v.v); }
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }

template <typename T> struct Number {
  using Real = float;
  static T narrow(float v) { return T(v); }
};
template <> struct Number<double> {
  using Real = double;
  static double narrow(double v) { return v; }
};
template <typename T> using Real = typename Number<T>::Real;

template <typename T> uint32_t pack2(T, float low, float high) {
  const T pair[2] = {T(low), T(high)};
  uint32_t u;
  memcpy(&u, pair, 4);
  return u;
}

inline float reciprocal(float x) { return 1.0f / x; }
inline double reciprocal(double x) { return 1.0 / x; }

// ----------------------------------------------------------------------------------- memory

inline uint4 load16(const void* p) {
  emu::check_aligned(p, 16);
  uint4 v;
  memcpy(&v, p, 16);
  return v;
}
inline uint4 load16_weights(const void* p) { return load16(p); }
inline void store16(void* p, uint4 v) {
  emu::check_aligned(p, 16);
  memcpy(p, &v, 16);
}
inline bool on16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline void compiler_fence() {}

// ------------------------------------------------------------ programmatic dependent launch

inline void pdl_wait() {
  emu::self->waited = emu::self->for_dependency = true;
  emu::wait_until([] { return emu::machine.dependency_met; });
  emu::self->for_dependency = false;
}
inline void pdl_launch() {
  if (!emu::self->waited) emu::fault("pdl_launch before pdl_wait");
}

// ------------------------------------------------------------------------------------ warps

inline void sync_warp() { emu::arrive_and_wait(emu::self->block->warps[emu::self->warp]); }
inline void sync_block() { emu::arrive_and_wait(emu::self->block->all); }

inline float shuffle_xor(float v, int mask) {
  uint32_t word;
  memcpy(&word, &v, 4);
  emu::warp_exchange(&word, 1, [&](const auto* lanes) { memcpy(&v, &lanes[emu::self->lane ^ mask][0], 4); });
  return v;
}

template <typename T> float half_of(uint32_t word, int i) {
  const uint16_t bits = uint16_t(word >> 16 * i);
  T v;
  memcpy(&v, &bits, 2);
  return widen(v);
}

template <typename T>
void mma_m16n8k16(T, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  emu::warp_exchange(words, 6, [&](const auto* lanes) {
    for (int e = 0; e < 4; ++e) {
      const int row = emu::self->lane / 4 + e / 2 * 8, column = emu::self->lane % 4 * 2 + e % 2;
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], b = lanes[column * 4 + k % 8 / 2][4 + k / 8];
        d[e] += half_of<T>(a, k % 2) * half_of<T>(b, k % 2);
      }
    }
  });
}
