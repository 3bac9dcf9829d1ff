// Runs the kernels of src/metal/swiglu.metal on the CPU against f64, by their names and with
// untyped buffers, as Metal does.
//
//   test [--names | --fail-fast]
//
// Every buffer ends (or begins) at an inaccessible page. The memory between elements and memory
// that was never written are NaN. Each result must be within a bound derived from the magnitudes of
// its terms (reference.hpp).
#include <atomic>
#include <csignal>
#include <thread>

#include "gate.hpp"
#include "products.hpp"

// Conversions to f16 and bf16, on which all other tests rely: every value converted there and back,
// and the ties between neighbours.
template <typename T>
void check_conversions(const char* name, unsigned infinity) {
    what = name;
    bool good = true;
    const auto value = [](unsigned bits) { T t; t.bits = bits; return (float)t; };
    for (unsigned bits = 0; bits < infinity; bits++) {
        const float below = value(bits), gap = bits + 1 < infinity ? value(bits + 1) - below : below - value(bits - 1);
        const float tie = below + gap / 2;
        good &= T(below).bits == bits && T(-below).bits == (bits | 0x8000);
        good &= T(tie).bits == bits + bits % 2 && T(std::nextafter(tie, 0.0f)).bits == bits && T(std::nextafter(tie, INFINITY)).bits == bits + 1;
    }
    good &= T(INFINITY).bits == infinity && std::isnan((float)T(NAN)) && std::isinf(value(infinity));
    count("conversions", good ? 0 : INF, "a value, a tie or an infinity");
}

int main(int argc, char** argv) {
    const std::string option = argc > 1 ? argv[1] : "";
    if (option == "--names") {
        for (const auto& [name, kernel] : shim::kernels()) puts(name.c_str());
        return 0;
    }
    fail_fast = option == "--fail-fast";
    signal(SIGSEGV, out_of_bounds);
    check_conversions<half>("f16", 0x7c00);
    check_conversions<bfloat>("bf16", 0x7f80);

    std::vector<std::function<void()>> cases = gate_cases();
    for (const Case& c : product_cases()) cases.push_back([c] { run_product(c); });
    std::atomic<size_t> next{0};
    std::vector<std::thread> workers;
    for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); i++)
        workers.emplace_back([&] { for (size_t at; (at = next++) < cases.size();) cases[at](); });
    for (auto& worker : workers) worker.join();

    std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.name < b.name; });
    for (const Group& g : groups)
        printf("%-40s %5zu passed, %zu failed, largest error %.2f of its bound\n", g.name.c_str(), g.passed, g.failed, g.worst);
    finish();
}
