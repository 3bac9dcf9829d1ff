// The driver API, cuBLAS and cuRAND. Functions that are missing here are the toolkit's stubs, which
// return an error.
#include <cmath>

#include "model.h"

namespace {

std::recursive_mutex lock;
#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock)

struct Stream {
  std::deque<Work> queue;
  std::shared_ptr<std::vector<Work>> capture;
  void run_one() {
    Work work = std::move(queue.front());
    queue.pop_front();
    work();
  }
  void run() {
    REQUIRE(!capture, "the host waits for a stream that is being captured");
    while (!queue.empty()) run_one();
  }
};

// Handle 0 is the legacy stream, handle 2 that of the calling thread.
Stream* stream_of(void* handle) {
  static Stream legacy;
  static thread_local Stream* own = new Stream;
  if (handle == nullptr) return &legacy;
  return handle == reinterpret_cast<void*>(2) ? own : static_cast<Stream*>(handle);
}

struct Event {
  bool recorded = false, done = false;
  Stream* stream = nullptr;
  size_t generation = 0;
};

std::map<uint64_t, size_t> live;
int context_storage;
thread_local void* current_context = nullptr;

struct Graph {
  std::vector<Work> work;
};

void run_until(const std::shared_ptr<bool>& done, Stream* stream) {
  while (!*done && !stream->queue.empty()) stream->run_one();
}

// The latest record of each event.
std::map<Event*, std::shared_ptr<bool>> records;

}  // namespace

void* span(uint64_t address, size_t bytes, const char* what) {
  LOCKED;
  if (bytes == 0) return reinterpret_cast<void*>(address);
  auto after = live.upper_bound(address);
  REQUIRE(after != live.begin(), "%s: %zu bytes at %#lx are not allocated", what, bytes, address);
  const auto& [start, size] = *std::prev(after);
  REQUIRE(address - start + bytes <= size, "%s: %zu bytes at offset %lu of an allocation of %zu", what, bytes, address - start, size);
  return reinterpret_cast<void*>(address);
}

void enqueue(void* handle, Work work) {
  LOCKED;
  Stream* stream = stream_of(handle);
  if (stream->capture) stream->capture->push_back(std::move(work));
  else stream->queue.push_back(std::move(work));
}

using Result = int;
enum { OK = 0, INVALID_VALUE = 1, NOT_READY = 600, NOT_FOUND = 500 };

extern "C" {

// ---- devices and contexts
Result cuInit(unsigned) { return OK; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? OK : 101; }
Result cuDeviceGetCount(int* count) { return *count = 1, OK; }
Result cuDevicePrimaryCtxRetain(void** context, int) { return *context = &context_storage, OK; }
Result cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Result cuCtxGetCurrent(void** context) { return *context = current_context, OK; }
Result cuCtxSetCurrent(void* context) { return current_context = context, OK; }
Result cuCtxSynchronize() { return OK; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 13: *value = 1980000; break;  // kHz
    case 36: *value = 2619000; break;  // of memory
    case 37: *value = 256; break;      // its bits: so few that each multiprocessor has its due of an H100's
    case 16: *value = 7; break;   // multiprocessors: few, so that small blocks take the kernels of large ones
    case 75: *value = 9; break;   // compute capability 9.0
    case 76: *value = 0; break;
    case 115: *value = 1; break;  // memory pools
    default: *value = 0;
  }
  return OK;
}
Result cuGetErrorName(int, const char** name) { return *name = "CUDA_MODEL_ERROR", OK; }
Result cuGetErrorString(int, const char** text) { return *text = "an error of the model", OK; }

// ---- memory
Result cuMemAllocAsync(uint64_t* address, size_t bytes, void*) {
  LOCKED;
  void* p = aligned_alloc(256, (std::max<size_t>(bytes, 1) + 255) / 256 * 256);
  memset(p, 0xff, bytes);
  *address = reinterpret_cast<uint64_t>(p);
  live[*address] = bytes;
  return OK;
}
Result cuMemFreeAsync(uint64_t address, void* stream) {
  LOCKED;
  const bool capturing = stream_of(stream)->capture != nullptr;
  // A graph allocates memory that it frees again at the next launch, at the same address, so it
  // stays.
  enqueue(stream, [=] {
    if (capturing) return;
    REQUIRE(live.erase(address) == 1, "freed twice: %#lx", address);
    free(reinterpret_cast<void*>(address));
  });
  return OK;
}
Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  std::vector<char> copy(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  enqueue(stream, [=] { memcpy(span(to, bytes, "copy to the device"), copy.data(), bytes); });
  return OK;
}
Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  LOCKED;
  stream_of(stream)->run();
  memcpy(to, span(from, bytes, "copy to the host"), bytes);
  return OK;
}
Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  enqueue(stream, [=] { memmove(span(to, bytes, "copy, target"), span(from, bytes, "copy, source"), bytes); });
  return OK;
}
Result cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
  enqueue(stream, [=] { memset(span(to, bytes, "set"), value, bytes); });
  return OK;
}

// ---- streams, events
Result cuStreamCreate(void** stream, unsigned) { return *stream = new Stream, OK; }
Result cuStreamDestroy_v2(void* stream) {
  LOCKED;
  stream_of(stream)->run();
  return OK;
}
Result cuStreamSynchronize(void* stream) {
  LOCKED;
  stream_of(stream)->run();
  return OK;
}
Result cuEventCreate(void** event, unsigned) { return *event = new Event, OK; }
Result cuEventDestroy_v2(void*) { return OK; }
Result cuEventRecord(void* handle, void* stream) {
  LOCKED;
  REQUIRE(!stream_of(stream)->capture, "an event of the host's tracking is recorded during capture");
  auto* event = static_cast<Event*>(handle);
  auto done = std::make_shared<bool>(false);
  event->stream = stream_of(stream);
  records[event] = done;
  enqueue(stream, [=] { *done = true; });
  return OK;
}
Result cuEventQuery(void* handle) {
  LOCKED;
  auto found = records.find(static_cast<Event*>(handle));
  return found == records.end() || *found->second ? OK : NOT_READY;
}
Result cuEventSynchronize(void* handle) {
  LOCKED;
  auto* event = static_cast<Event*>(handle);
  if (auto found = records.find(event); found != records.end()) run_until(found->second, event->stream);
  return OK;
}
Result cuStreamWaitEvent(void* stream, void* handle, unsigned) {
  LOCKED;
  auto* event = static_cast<Event*>(handle);
  auto found = records.find(event);
  if (found == records.end()) return OK;
  REQUIRE(!stream_of(stream)->capture, "a captured stream waits for an event from outside");
  enqueue(stream, [done = found->second, from = event->stream] { run_until(done, from); });
  return OK;
}

// ---- graphs
Result cuStreamIsCapturing(void* stream, int* status) {
  LOCKED;
  return *status = stream_of(stream)->capture ? 1 : 0, OK;
}
Result cuStreamBeginCapture_v2(void* stream, int) {
  LOCKED;
  stream_of(stream)->capture = std::make_shared<std::vector<Work>>();
  return OK;
}
Result cuStreamEndCapture(void* stream, void** graph) {
  LOCKED;
  Stream* s = stream_of(stream);
  *graph = new Graph{*s->capture};
  s->capture = nullptr;
  return OK;
}
Result cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) { return *executable = graph, OK; }
Result cuGraphLaunch(void* executable, void* stream) {
  for (const Work& work : static_cast<Graph*>(executable)->work) enqueue(stream, work);
  return OK;
}
Result cuGraphDestroy(void*) { return OK; }
Result cuGraphExecDestroy(void*) { return OK; }

// ---- modules and launches
Result cuModuleLoadData(void** module, const void*) { return *module = new int, OK; }
Result cuModuleUnload(void*) { return OK; }
Result cuModuleGetFunction(void** function, void*, const char* name) { return *function = new std::string(name), OK; }
Result cuFuncGetAttribute(int* value, int, void*) { return *value = 90, OK; }
Result cuFuncSetAttribute(void*, int, int) { return OK; }
Result cuLaunchKernel(void* f, unsigned gx, unsigned, unsigned, unsigned bx, unsigned, unsigned, unsigned shared, void* stream, void** args,
                      void**) {
  enqueue(stream, kernel({*static_cast<std::string*>(f), gx, bx, shared, false, args}));
  return OK;
}
struct LaunchAttribute {
  int id;
  char pad[4];
  int value[16];
};
struct LaunchConfig {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
Result cuLaunchKernelEx(const LaunchConfig* c, void* f, void** args, void**) {
  REQUIRE(c->gy == 1 && c->gz == 1 && c->by == 1 && c->bz == 1, "a grid of one dimension");
  REQUIRE(c->count == 0 || (c->count == 1 && c->attributes->id == 6 && c->attributes->value[0] == 1), "the attribute is not 6 = 1");
  enqueue(c->stream, kernel({*static_cast<std::string*>(f), c->gx, c->bx, c->shared, c->count == 1, args}));
  return OK;
}
// The map contains its own description: address, rows, columns, rows of a box, type, columns of a
// box.
Result cuTensorMapEncodeTiled(uint64_t* map, int type, unsigned rank, void* address, const uint64_t* dims, const uint64_t* strides,
                              const unsigned* box, const unsigned* steps, int interleave, int swizzle, int promotion, int fill) {
  REQUIRE(rank == 2 && (type == 9 || type == 6), "a matrix of bf16 or f16, found rank %u, type %d", rank, type);
  REQUIRE(reinterpret_cast<uint64_t>(address) % 16 == 0 && strides[0] == dims[0] * 2 && strides[0] % 16 == 0, "rows on 16 bytes");
  REQUIRE((box[0] == 64 || box[0] == 16) && steps[0] == 1 && steps[1] == 1, "boxes of 64 or 16 columns");
  REQUIRE(interleave == 0 && swizzle == (box[0] == 64 ? 3 : 0) && promotion == 3 && fill == 0, "swizzle of 128 B if any, promotion of 256 B, zeros outside");
  REQUIRE(reinterpret_cast<uint64_t>(map) % 64 == 0, "a map lies on 64 bytes");
  memset(map, 0, 128);
  map[0] = reinterpret_cast<uint64_t>(address), map[1] = dims[1], map[2] = dims[0], map[3] = box[1], map[4] = type, map[5] = box[0];
  return OK;
}

// ---- cuBLAS: columns, as it has them
struct Blas {
  void* stream = nullptr;
};
Result cublasCreate_v2(void** handle) { return *handle = new Blas, OK; }
Result cublasDestroy_v2(void*) { return OK; }
Result cublasSetStream_v2(void* handle, void* stream) { return static_cast<Blas*>(handle)->stream = stream, OK; }

static Type type_of(int cuda) {
  return cuda == 0 ? Type::F32 : cuda == 1 ? Type::F64 : cuda == 2 ? Type::F16 : cuda == 14 ? Type::BF16 : (fail("cuBLAS type %d", cuda), Type::F32);
}
// Appends a line "rows columns sums" to the file that CUDA_MODEL_PRODUCTS names, for a row-major
// result.
static void record(int rows, int columns, int sums) {
  static FILE* file = getenv("CUDA_MODEL_PRODUCTS") ? fopen(getenv("CUDA_MODEL_PRODUCTS"), "a") : nullptr;
  if (file) fprintf(file, "%d %d %d\n", rows, columns, sums), fflush(file);
}
// C (m,n) = alpha·op(A)·op(B) + beta·C, leading dimensions of columns
static Work product(int ta, int tb, int m, int n, int k, double alpha, uint64_t a, int lda, uint64_t b, int ldb, double beta, uint64_t c, int ldc,
                    Type type) {
  record(n, m, k);
  const size_t columns_a = ta ? m : k, columns_b = tb ? k : n;
  REQUIRE(lda >= (ta ? k : m) && ldb >= (tb ? n : k) && ldc >= m, "leading dimensions %d, %d, %d of %d, %d, %d", lda, ldb, ldc, m, n, k);
  return [=] {
    const auto A = operand(type, a, (columns_a - 1) * lda + (ta ? k : m), "A"), B = operand(type, b, (columns_b - 1) * ldb + (tb ? n : k), "B"),
               C = operand(type, c, size_t(n - 1) * ldc + m, "C");
    std::vector<double> left(size_t(m) * k), right(size_t(n) * k);
    for (int i = 0; i < m; ++i)
      for (int p = 0; p < k; ++p) left[size_t(i) * k + p] = A.at(ta ? size_t(i) * lda + p : size_t(p) * lda + i);
    for (int j = 0; j < n; ++j)
      for (int p = 0; p < k; ++p) right[size_t(j) * k + p] = B.at(tb ? size_t(p) * ldb + j : size_t(j) * ldb + p);
    for (int j = 0; j < n; ++j)
      for (int i = 0; i < m; ++i) {
        double sum = 0;
        for (int p = 0; p < k; ++p) sum += left[size_t(i) * k + p] * right[size_t(j) * k + p];
        const size_t at = size_t(j) * ldc + i;
        C.put(at, alpha * sum + (beta == 0 ? 0 : beta * C.at(at)));
      }
  };
}
Result cublasGemmStridedBatchedEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, uint64_t a, int type_a, int lda,
                                  long long stride_a, uint64_t b, int type_b, int ldb, long long stride_b, const void* beta, uint64_t c,
                                  int type_c, int ldc, long long stride_c, int count, int compute, int) {
  REQUIRE(type_a == type_b && type_b == type_c && compute == 68, "one type and f32 sums, found %d, %d, %d, %d", type_a, type_b, type_c, compute);
  const Type type = type_of(type_a);
  const size_t size = size_of(type);
  for (int i = 0; i < count; ++i)
    enqueue(static_cast<Blas*>(handle)->stream,
            product(ta, tb, m, n, k, *static_cast<const float*>(alpha), a + i * stride_a * size, lda, b + i * stride_b * size, ldb,
                    *static_cast<const float*>(beta), c + i * stride_c * size, ldc, type));
  return OK;
}
Result cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, uint64_t a, int type_a, int lda, uint64_t b,
                    int type_b, int ldb, const void* beta, uint64_t c, int type_c, int ldc, int compute, int algorithm) {
  return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute,
                                    algorithm);
}
Result cublasDgemmStridedBatched(void* handle, int ta, int tb, int m, int n, int k, const double* alpha, uint64_t a, int lda, long long stride_a,
                                 uint64_t b, int ldb, long long stride_b, const double* beta, uint64_t c, int ldc, long long stride_c,
                                 int count) {
  for (int i = 0; i < count; ++i)
    enqueue(static_cast<Blas*>(handle)->stream, product(ta, tb, m, n, k, *alpha, a + i * stride_a * 8, lda, b + i * stride_b * 8, ldb, *beta,
                                                        c + i * stride_c * 8, ldc, Type::F64));
  return OK;
}

// ---- cuRAND: only made and ended
Result curandCreateGenerator(void** generator, int) { return *generator = new int, OK; }
Result curandDestroyGenerator(void*) { return OK; }
Result curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return OK; }
Result curandSetStream(void*, void*) { return OK; }

}  // extern "C"
