// The gate alone and its gradient.
#pragma once
#include "harness.hpp"

// The position of element (r, c) of an operand.
struct Strides { size_t offset, row, column; };

struct Operand {
    Strides strides;
    Buffer buffer;
    Operand(const DType& type, const Strides& s, size_t rows, size_t columns, bool at_the_front)
        : strides(s), buffer(type, s.offset + (rows - 1) * s.row + (columns - 1) * s.column + 1, at_the_front) {}
    size_t at(size_t r, size_t c) const { return strides.offset + r * strides.row + c * strides.column; }
    double get(size_t r, size_t c) const { return buffer.get(at(r, c)); }
    void* data() const { return (char*)buffer.memory.data() + strides.offset * buffer.type.size; }
};

// Numbers from every relevant binade, whose mantissas use all bits, and special numbers.
double number(std::mt19937& random, bool special) {
    static const double values[] = {0.0, -0.0, INF, -INF, NAN, 3.4e38, -3.4e38, 1e-40, -1e-40, -88.8, -104, 89, 7, -7, 0.5, -0.5, 16, -16, 6e4, -6e4};
    if (special && random() % 3 == 0) return values[random() % std::size(values)];
    const double size = std::ldexp(1 + (random() & 0xfffff) / 1048576.0, -20 + (int)(random() % 26));
    return random() % 2 ? size : -size;
}

// Checks `found` against `exact`, within `error` and the dtype's rounding; ∞ is accepted where the
// dtype overflows.
void compare(Comparison& all, const DType& t, size_t i, double found, double exact, double error) {
    error = or_few_roundings(error, exact);
    const double bound = error + t.half_ulp * (std::fabs(exact) + error) + t.smallest;
    const bool exceeds = std::isfinite(exact) && std::fabs(exact) + bound > t.largest;
    if (exceeds && std::isinf(found) && std::signbit(found) == std::signbit(exact)) return;
    all.element(i, found, exact, std::isnan(bound) ? 0 : bound);
}

// Whether `found` is a·b where a is infinite in f32: the result is ∞·b, or NaN if b has underflowed
// to 0 in f32 and not in f64.
bool overflows(double a, double b, double found) {
    const bool vanished = std::fabs(b) < 1e-37;
    return std::fabs(a) > 3.4e38 && (std::isinf(found) || (vanished && std::isnan(found)));
}

void run_gate(const DType& t, const Op& op, size_t rows, size_t columns, const std::vector<Strides>& strides, bool special, unsigned seed) {
    const bool backward = strides.size() == 3;
    const std::string name = std::string(backward ? "gate_backward_" : "gate_forward_") + t.name;
    what = name + " " + op.name + " " + std::to_string(rows) + " x " + std::to_string(columns);
    descending = seed % 2;
    std::mt19937 random(seed);
    std::vector<std::unique_ptr<Operand>> in;
    std::vector<void*> buffers;
    bool aligned = columns % 4 == 0;
    for (const Strides& s : strides) {
        in.push_back(std::make_unique<Operand>(t, s, rows, columns, seed / 2 % 2));
        buffers.push_back(in.back()->data());
        aligned &= s.column == 1 && s.row % 4 == 0 && s.offset % 4 == 0;
        Operand& o = *in.back();
        for (size_t r = 0; r < rows; r++)
            for (size_t c = 0; c < columns; c++) o.buffer.set(o.at(r, c), number(random, special));
    }
    const size_t n = rows * columns;
    Buffer out(t, n * (backward ? 2 : 1), seed / 2 % 2);
    buffers.push_back(out.memory.data());
    const auto stride = [&](size_t i) { return i < in.size() ? strides[i] : Strides{}; };
    Pair p{(uint)rows, (uint)columns, (uint)stride(0).row, (uint)stride(0).column, (uint)stride(1).row, (uint)stride(1).column,
           (uint)stride(2).row, (uint)stride(2).column, parameters(op)};
    buffers.push_back(&p);
    Comparison comparison;
    try {
        launch(name, aligned, buffers, {up_to(columns, THREADS * ELEMENTS), (unsigned)rows, 1});
    } catch (const std::exception& e) {
        return count("launches", INF, e.what());
    }
    for (size_t i = 0; i < n; i++) {
        const double g = in[0]->get(i / columns, i % columns), u = in[1]->get(i / columns, i % columns);
        const Inputs inner = inputs(op, g, u);
        const reference::Slope act = activation(op, inner.g);
        if (!backward) {
            if (overflows(inner.u, act.value, out.get(i)) || overflows(act.value, inner.u, out.get(i))) continue;
            const double exact = glu(op, g, u);
            compare(comparison, t, i, out.get(i), exact, glu_error(op, g, u, 0, 0));
            // silu(-∞)·up = -0·up, including the sign
            if (std::isinf(g) && exact == 0 && u != 0 && std::signbit(exact) != std::signbit(out.get(i))) comparison.element(i, NAN, exact, 0);
            continue;
        }
        const double d = in[2]->get(i / columns, i % columns);
        const Gradients exact = glu_gradient(op, g, u, d), error = gradient_error(op, g, u, d);
        if (!overflows(d * inner.u, act.slope, out.get(i)) && !overflows(act.slope, d * inner.u, out.get(i))) compare(comparison, t, i, out.get(i), exact.dgate, error.dgate);
        if (!overflows(d, act.value, out.get(n + i)) && !overflows(act.value, d, out.get(n + i))) compare(comparison, t, n + i, out.get(n + i), exact.dup, error.dup);
    }
    comparison.report(std::string(backward ? "gate_backward " : "gate_forward ") + (special ? "of special values " : "") + t.name);
}

std::vector<std::function<void()>> gate_cases() {
    std::vector<std::function<void()>> all;
    const auto every = ops();
    unsigned seed = 0;
    for (const DType& t : DTYPES) {
        for (const Op& op : every)
            for (unsigned operands : {2, 3}) {
                // One long row, which is the launcher's view of contiguous operands: whole vectors,
                // and a tail.
                for (size_t n : {1, 2, 3, 4, 5, 511, 512, 513, 4096, 4099}) {
                    const std::vector<Strides> contiguous(operands, Strides{0, n, 1});
                    seed++;
                    for (bool special : {false, true})
                        all.push_back([=, &t] { run_gate(t, op, 1, n, contiguous, special, seed); });
                }
            }
        // Halves of a packed row, interleaved, transposed, broadcast along either side, offsets.
        const size_t m = 7, i = 36;
        const Strides layouts[] = {{0, i, 1}, {5, i, 1}, {0, 2 * i, 1}, {i, 2 * i, 1}, {1, 2 * i, 2}, {3, 1, m}, {8, 0, 1}, {9, 1, 0}, {2, 0, 0}};
        for (const Strides& a : layouts)
            for (const Strides& b : layouts)
                for (unsigned operands : {2, 3}) {
                    std::vector<Strides> strides{a, b, layouts[++seed % std::size(layouts)]};
                    strides.resize(operands);
                    const Op op = every[seed % every.size()];
                    all.push_back([=, &t] { run_gate(t, op, m, i, strides, false, seed); });
                }
    }
    return all;
}
