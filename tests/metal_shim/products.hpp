// The products, with and without the gate: x·Wᵀ by decode and by tile.
#pragma once
#include "harness.hpp"

struct Case {
    const DType& type;
    const char* kind;      // decode or tile
    unsigned tile_rows;    // of the kernel
    unsigned m, n, k;      // n: columns of the output
    bool gated, bias;
    Op op;
    double factor;
    unsigned seed;
    std::string special;   // nan, inf: one element of x and one of w
};

// Checks the sums and their error bounds, then the values and theirs.
void check_product(const Case& c, const Buffer& x, const Buffer& w, const Buffer& b, const Buffer& out) {
    Comparison comparison;
    const size_t k = c.k;
    const auto sum = [&](size_t row, size_t w_row) -> std::pair<double, double> {
        double s = 0, size = 0;
        for (size_t i = 0; i < k; i++) {
            const double p = x.get(row * k + i) * w.get(w_row * k + i);
            s += p, size += std::fabs(p);
        }
        if (c.bias) s += b.get(w_row), size += std::fabs(b.get(w_row));
        return {s, gamma(k + c.bias) * size};
    };
    for (size_t row = 0; row < c.m; row++)
        for (size_t j = 0; j < c.n; j++) {
            const auto [first, first_error] = sum(row, j);
            double exact, error;
            if (c.gated) {
                const auto [up, up_error] = sum(row, c.n + j);
                exact = glu(c.op, first, up);
                error = glu_error(c.op, first, up, first_error, up_error);
            } else {
                exact = c.factor * first;
                error = std::fabs(c.factor) * first_error + U * std::fabs(exact);
            }
            error = or_few_roundings(error, exact);
            if (std::isfinite(exact)) error += c.type.half_ulp * (std::fabs(exact) + error) + c.type.smallest;
            comparison.element(row * c.n + j, out.get(row * c.n + j), exact, error);
        }
    comparison.report(std::string(c.gated ? "gate_up " : "linear ") + c.kind + (c.special.empty() ? "" : " of NaN and infinities") +
                      " " + c.type.name);
}

// A row of the batch has the same bits when it is computed alone: the operations on a row and their
// order do not depend on the other rows.
void check_rows_alone(const Case& c, const std::string& name, bool aligned, const Buffer& x, std::vector<void*> buffers, const Buffer& out,
                      Product p, Position grid) {
    Buffer alone(c.type, c.n, false);
    p.rows = 1;
    grid.x = std::string(c.kind) == "tile" ? 1 : grid.x;
    (std::string(c.kind) == "tile" ? grid.z : grid.y) = 1;
    bool same = true;
    for (size_t row = 0; row < c.m; row++) {
        buffers[0] = (char*)x.memory.data() + row * c.k * c.type.size;
        buffers[3] = alone.memory.data();
        buffers[4] = &p;
        launch(name, aligned, buffers, grid);
        same &= !memcmp(alone.memory.data(), (char*)out.memory.data() + row * c.n * c.type.size, c.n * c.type.size);
    }
    count("a row alone and among others", same ? 0 : INF, "other bits");
}

void run_product(const Case& c) {
    const std::string name = std::string(c.gated ? "gate_up_" : "linear_") + c.kind + "_" + std::to_string(c.tile_rows) + "_" + c.type.name;
    what = name + " M " + std::to_string(c.m) + " N " + std::to_string(c.n) + " K " + std::to_string(c.k) + (c.bias ? " bias " : " ") +
           (c.gated ? c.op.name : "") + " " + c.special;
    descending = c.seed % 2;
    const bool front = c.seed / 2 % 2;
    const size_t w_rows = c.n * (c.gated ? 2 : 1);
    Buffer x(c.type, size_t(c.m) * c.k, front), w(c.type, w_rows * c.k, front), b(c.type, w_rows, front), out(c.type, size_t(c.m) * c.n, front);
    std::mt19937 random(c.seed);
    std::uniform_real_distribution<double> uniform(-1, 1);
    // A uniform weight in ±√(3/K) has variance 1/K, so sums have the magnitude of x. x is
    // multiplied by 3 so that the gates reach the tails of the activations.
    for (size_t i = 0; i < x.n; i++) x.set(i, 3 * uniform(random));
    for (size_t i = 0; i < w.n; i++) w.set(i, uniform(random) * std::sqrt(3.0 / c.k));
    for (size_t i = 0; i < b.n; i++) b.set(i, 0.5 * uniform(random));
    if (!c.special.empty()) {
        x.set(random() % x.n, c.special == "nan" ? NAN : INF);
        w.set(random() % w.n, c.special == "nan" ? NAN : -INF);
    }
    const size_t chunk = 16 / c.type.size;
    const bool aligned = c.k % chunk == 0 && c.seed % 8 != 7; // the other path takes any k
    Product p{c.m, c.n, c.k, c.bias, (float)c.factor, parameters(c.op)};
    const std::string kind = c.kind;
    const unsigned columns = kind == "decode" ? SIMDGROUPS * WEIGHT_ROWS / (c.gated ? 2 : 1) : TILE_COLUMNS / (c.gated ? 2 : 1);
    const unsigned rows = up_to(c.m, c.tile_rows), over = up_to(c.n, columns);
    const Position grid = kind == "decode" ? Position{over, rows, 1} : Position{std::min(rows, RASTER), over, up_to(rows, RASTER)};
    void* bias = c.bias ? b.memory.data() : w.memory.data(); // as the launcher: w stands in, and is not read
    try {
        const std::vector<void*> buffers{x.memory.data(), w.memory.data(), bias, out.memory.data(), &p};
        launch(name, aligned, buffers, grid);
        check_product(c, x, w, b, out);
        if (c.m < 20 && c.seed % 16 == 0 && c.special.empty()) check_rows_alone(c, name, aligned, x, buffers, out, p, grid);
    } catch (const std::exception& e) {
        count("launches", INF, e.what());
    }
}

std::vector<Case> product_cases() {
    std::vector<Case> all;
    const auto every = ops();
    unsigned seed = 0;
    const auto add = [&](const DType& t, const char* kind, unsigned rows, unsigned m, unsigned n, unsigned k, bool gated, const char* special = "") {
        // The seed selects activation, bias, factor, order and the guarded end of the buffers, each
        // with another period.
        seed++;
        all.push_back({t, kind, rows, m, n, k, gated, seed % 3 != 0, every[seed % every.size()], seed % 5 ? 1.0 : (double)-0.4f, seed, special});
    };
    for (const DType& t : DTYPES) {
        const unsigned chunk = 16 / t.size, step = 4 * chunk; // elements of 16 B; a tile's step over k
        for (bool gated : {true, false}) {
            for (unsigned rows : {1, 2, 4, 8}) {
                // k at the edges of a lane's chunk and a simdgroup's sweep; n at the edges of a
                // simdgroup's and a threadgroup's features.
                for (unsigned k : {1u, chunk - 1, chunk, chunk + 1, 31u, 32u, 33u, 32 * chunk - chunk, 32 * chunk, 32 * chunk + 1, 33 * chunk, 100u})
                    for (unsigned n : {1, 2, 3, 5, 8, 9, 16, 17, 23}) add(t, "decode", rows, 1 + seed % 11, n, k, gated);
                for (unsigned m = 1; m <= 40; m++) add(t, "decode", rows, m, 11, m % 3 ? 72 : 75, gated);
                for (unsigned m : {1, 7, 8, 9}) for (const char* s : {"nan", "inf"}) add(t, "decode", rows, m, 13, m % 2 ? 64 : 67, gated, s);
            }
            for (unsigned rows : {32, 64}) {
                for (unsigned k : {1u, 7u, 8u, 9u, step - 1, step, step + 1, 2 * step + chunk, 100u})
                    for (unsigned n : {1, 15, 16, 17, 31, 32, 33, 64, 65}) add(t, "tile", rows, 1 + seed % 67, n, k, gated);
                for (unsigned m = 1; m <= 40; m++) add(t, "tile", rows, m, 35, m % 3 ? 40 : 43, gated);
                for (unsigned m : {63, 64, 65, 127, 128, 129, 130}) add(t, "tile", rows, m, 70, 51, gated);
                add(t, "tile", rows, rows * RASTER + 1, 3, 9, gated); // one row into the second raster
                for (unsigned m : {5, 33, 65}) for (const char* s : {"nan", "inf"}) add(t, "tile", rows, m, 37, m % 2 ? 48 : 50, gated, s);
            }
        }
    }
    return all;
}
