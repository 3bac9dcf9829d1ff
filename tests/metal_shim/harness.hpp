// Dtypes, buffers, counting, launching.
#pragma once
#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "swiglu.inc"

#undef device
#undef constant
#undef thread
#undef threadgroup

#include "reference.hpp"

using namespace reference;
using shim::Guarded, shim::Position;

// ---------------------------------------------------------------- dtypes

struct DType {
    const char* name;
    size_t size;
    double half_ulp;  // relative: of rounding f32 to it
    double smallest;  // half the distance of two denormals, likewise
    double largest;
    double (*load)(const void*);
    void (*store)(void*, double);
};

template <typename T> double load_as(const void* p) { T t; memcpy(&t, p, sizeof t); return (double)(float)t; }
template <typename T> void store_as(void* p, double v) { T t((float)v); memcpy(p, &t, sizeof t); }

const DType DTYPES[] = {
    {"f32", 4, 0, 0, 3.4028235e38, load_as<float>, store_as<float>},
    {"f16", 2, std::ldexp(1, -11), std::ldexp(1, -25), 65504, load_as<half>, store_as<half>},
    {"bf16", 2, std::ldexp(1, -8), std::ldexp(1, -134), 3.3895e38, load_as<bfloat>, store_as<bfloat>},
};

// A buffer of a dtype, and the numbers it contains.
struct Buffer {
    const DType& type;
    Guarded memory;
    size_t n;
    Buffer(const DType& type, size_t n, bool at_the_front) : type(type), memory(n * type.size, at_the_front), n(n) {}
    double get(size_t i) const { return type.load((char*)memory.data() + i * type.size); }
    void set(size_t i, double v) { type.store((char*)memory.data() + i * type.size, v); }
};

// ---------------------------------------------------------------- counting

struct Group {
    std::string name;
    size_t passed = 0, failed = 0;
    double worst = 0; // error in units of its bound
    std::string first_failure;
};

std::mutex counting;
std::vector<Group> groups;
bool fail_fast = false;
thread_local std::string what; // the case that runs, for the failure's message

void finish() {
    size_t passed = 0, failed = 0;
    for (const Group& g : groups) passed += g.passed, failed += g.failed;
    printf("%zu passed, %zu failed\n", passed, failed);
    fflush(stdout);
    _exit(failed ? 1 : 0);
}

// Counts a case, which is one launch. `worst` is its largest error over its bound; above 1 or NaN
// is a failure.
void count(const std::string& group, double worst, const std::string& message = "") {
    const std::lock_guard lock(counting);
    auto at = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.name == group; });
    if (at == groups.end()) at = groups.insert(groups.end(), {group});
    if (worst <= 1) {
        at->passed++;
        at->worst = std::max(at->worst, worst);
        return;
    }
    at->failed++;
    if (at->first_failure.empty()) {
        at->first_failure = what + ": " + message;
        printf("FAILED %s: %s\n", group.c_str(), at->first_failure.c_str());
    }
    if (fail_fast) finish();
}

void out_of_bounds(int) {
    static char text[512];
    const int n = snprintf(text, sizeof text, "FAILED %s: touches memory beyond a buffer\n0 passed, 1 failed\n", what.c_str());
    (void)!write(1, text, n);
    _exit(1);
}

// The largest |found - exact| / bound of all elements, and its position.
class Comparison {
public:
    void element(size_t i, double found, double exact, double bound) {
        double ratio = std::fabs(found - exact) / bound;
        if (found == exact || (std::isnan(found) && std::isnan(exact))) ratio = 0;
        if (std::isnan(ratio)) ratio = INF;
        if (ratio <= worst) return;
        worst = ratio;
        char text[160];
        snprintf(text, sizeof text, "element %zu: %.9g, expected %.9g, bound %.3g", i, found, exact, bound);
        message = text;
    }
    void report(const std::string& group) const { count(group, worst, message); }

private:
    double worst = 0;
    std::string message;
};

// ---------------------------------------------------------------- launching

thread_local bool descending = false;

void launch(const std::string& name, bool aligned, std::vector<void*> buffers, Position grid) {
    static const auto& all = shim::kernels();
    const auto kernel = all.find(name);
    if (kernel == all.end()) throw std::runtime_error("no kernel " + name);
    static thread_local shim::Fibers group(THREADS);
    ALIGNED = aligned;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                for (auto [memory, bytes] : shim::threadgroup_memory) memset(memory, 0xff, bytes);
                const Position at{x, y, z};
                group.run([&](unsigned i) { kernel->second(buffers.data(), at, i / LANES, i % LANES); }, descending);
            }
}

unsigned up_to(unsigned n, unsigned tile) { return (n + tile - 1) / tile; }

GluParams parameters(const Op& op) {
    return {op.activation, (float)op.beta, (float)op.m, (float)op.limit, (float)op.c};
}
