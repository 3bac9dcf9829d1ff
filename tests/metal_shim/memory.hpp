// Memory that detects errors: buffers between inaccessible pages, and threadgroup memory that
// starts as NaN. Also the list of kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>
#include <sys/mman.h>
#include <unistd.h>

namespace shim {

// Bytes that end where an inaccessible page begins (or begin where one ends).
class Guarded {
public:
    explicit Guarded(size_t bytes, bool at_the_front = false) {
        const size_t page = sysconf(_SC_PAGESIZE), inner = (bytes + page - 1) / page * page;
        mapped = inner + 2 * page;
        base = (char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        mprotect(base, page, PROT_NONE);
        mprotect(base + page + inner, page, PROT_NONE);
        begin = at_the_front ? base + page : base + page + inner - bytes;
        memset(base + page, 0xff, inner); // NaN in every dtype
    }
    ~Guarded() { munmap(base, mapped); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    void* data() const { return begin; }

private:
    char *base, *begin;
    size_t mapped;
};

// The threadgroup memory on this OS thread, which is filled with NaN again before the next
// threadgroup.
inline thread_local std::vector<std::pair<void*, size_t>> threadgroup_memory;

template <typename T, size_t N>
class Threadgroup {
public:
    Threadgroup() : memory(N * sizeof(T)) { threadgroup_memory.emplace_back(memory.data(), N * sizeof(T)); }
    template <typename U> explicit operator U*() const { return (U*)memory.data(); }

private:
    Guarded memory;
};

struct Position { unsigned x, y, z; };

// A kernel with untyped buffers in the order of its [[buffer(n)]], as Metal binds them.
using Kernel = std::function<void(void* const* buffers, const Position& group, unsigned simd, unsigned lane)>;

inline std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

struct Registered {
    // (buffers..., params, group, simd, lane)
    template <typename A, typename B, typename C, typename P, typename G>
    Registered(const char* name, void (*f)(A*, B*, C*, P&, G, unsigned, unsigned)) {
        add(name, [f](void* const* b, const Position& g, unsigned simd, unsigned lane) {
            f((A*)b[0], (B*)b[1], (C*)b[2], *(P*)b[3], G{g.x, g.y, g.z}, simd, lane);
        });
    }
    template <typename A, typename B, typename C, typename D, typename P, typename G>
    Registered(const char* name, void (*f)(A*, B*, C*, D*, P&, G, unsigned, unsigned)) {
        add(name, [f](void* const* b, const Position& g, unsigned simd, unsigned lane) {
            f((A*)b[0], (B*)b[1], (C*)b[2], (D*)b[3], *(P*)b[4], G{g.x, g.y, g.z}, simd, lane);
        });
    }

private:
    static void add(const char* name, Kernel kernel) {
        if (!kernels().emplace(name, std::move(kernel)).second) throw std::runtime_error(std::string("twice: ") + name);
    }
};

}  // namespace shim
