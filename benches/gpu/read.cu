// Reads n vectors of 16 B once: the ceiling of anything that has to read its weights. The sum is written only where it is a value that
// random bits do not give, so that nothing is left out.
//
// read.ptx is this file: nvcc -std=c++17 -O3 -arch=compute_80 --ptx read.cu
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* data, unsigned long long n, unsigned* sink) {
  const unsigned long long threads = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long at = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned sum = 0;
  for (; at + 7 * threads < n; at += 8 * threads) {  // 8 loads in flight per thread
    uint4 v[8];
#pragma unroll
    for (int u = 0; u < 8; ++u)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[u].x), "=r"(v[u].y), "=r"(v[u].z), "=r"(v[u].w) : "l"(data + at + u * threads));
#pragma unroll
    for (int u = 0; u < 8; ++u) sum += (v[u].x ^ v[u].y) + (v[u].z ^ v[u].w);
  }
  for (; at < n; at += threads) sum += data[at].x ^ data[at].y ^ data[at].z ^ data[at].w;
  if (sum == 0x12345678u) atomicAdd(sink, sum);
}
