// The threads of one threadgroup, as fibers on one OS thread.
//
// A fiber runs until it needs the others: at a threadgroup barrier, or at an operation of its
// simdgroup. Simdgroups run one after another in ascending or descending order, each as far as it
// can get alone. Data that is read before it was written, or overwritten before it was read, is
// therefore wrong every time and not only occasionally. A barrier that not all threads reach is an
// error, as are lanes at different operations.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>
#include <ucontext.h>

namespace shim {

constexpr unsigned LANES = 32;

enum class State { Ready, AtBarrier, AtOperation, Done };

class Fibers;
inline thread_local Fibers* running = nullptr; // the threadgroup of the fiber that runs

class Fibers {
public:
    explicit Fibers(unsigned threads) : fibers(threads), slots(threads / LANES) {
        for (auto& fiber : fibers) fiber.stack = std::make_unique<char[]>(STACK);
    }

    // Runs `body(thread)` for all threads. Throws on a deadlock.
    void run(const std::function<void(unsigned)>& body, bool descending) {
        this->body = &body;
        running = this;
        for (auto& fiber : fibers) fiber.state = State::Ready, fiber.started = false, fiber.operations = 0;
        const unsigned groups = fibers.size() / LANES;
        while (!all(State::Done, 0, fibers.size())) {
            for (unsigned g = 0; g < groups; g++) run_simdgroup((descending ? groups - 1 - g : g) * LANES);
            if (all(State::Done, 0, fibers.size())) break;
            if (!all(State::AtBarrier, 0, fibers.size())) throw std::runtime_error("a barrier that not all threads reach");
            for (auto& fiber : fibers) fiber.state = State::Ready;
        }
        running = nullptr;
    }

    unsigned lane() const { return current % LANES; }

    void barrier() { wait(State::AtBarrier); }

    // Gives every lane the values of all 32 lanes. `kind` distinguishes the operations.
    template <typename V>
    void exchange(int kind, const V& mine, V* all_lanes) {
        static_assert(sizeof(V) <= SLOT);
        Fiber& fiber = fibers[current];
        // A lane is at most one operation ahead of another, so two alternating buffers are enough.
        Slot& slot = slots[current / LANES].buffers[fiber.operations++ % 2];
        memcpy(slot.bytes[lane()], &mine, sizeof mine);
        fiber.kind = kind;
        wait(State::AtOperation);
        for (unsigned l = 0; l < LANES; l++) memcpy(&all_lanes[l], slot.bytes[l], sizeof mine);
    }

private:
    static constexpr size_t STACK = 64 << 10, SLOT = 16;
    struct Fiber {
        std::unique_ptr<char[]> stack;
        ucontext_t context;
        jmp_buf place;
        State state;
        bool started;
        unsigned operations;
        int kind;
    };
    struct Slot { uint8_t bytes[LANES][SLOT]; };
    struct Slots { Slot buffers[2]; };

    std::vector<Fiber> fibers;
    std::vector<Slots> slots;
    const std::function<void(unsigned)>* body = nullptr;
    unsigned current = 0;
    ucontext_t scheduler_context;
    jmp_buf scheduler;

    bool all(State state, unsigned from, unsigned to) const {
        for (unsigned i = from; i < to; i++)
            if (fibers[i].state != state) return false;
        return true;
    }

    // Runs until every lane waits at a barrier or is done.
    void run_simdgroup(unsigned first) {
        for (;;) {
            for (unsigned i = first; i < first + LANES; i++)
                if (fibers[i].state == State::Ready) resume(i);
            if (!any(State::AtOperation, first)) return;
            for (unsigned i = first; i < first + LANES; i++) {
                const Fiber& fiber = fibers[i];
                if (fiber.state != State::AtOperation || fiber.kind != fibers[first].kind)
                    throw std::runtime_error("an operation of a simdgroup that not all lanes reach");
            }
            for (unsigned i = first; i < first + LANES; i++) fibers[i].state = State::Ready;
        }
    }

    bool any(State state, unsigned first) const {
        for (unsigned i = first; i < first + LANES; i++)
            if (fibers[i].state == state) return true;
        return false;
    }

    __attribute__((noinline)) void resume(unsigned i) {
        current = i;
        Fiber& fiber = fibers[i];
        if (_setjmp(scheduler)) return; // back from the fiber
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Fibers::start, 0);
        setcontext(&fiber.context);
        abort(); // setcontext does not return
    }

    static void start() {
        Fibers* group = running;
        (*group->body)(group->current);
        group->fibers[group->current].state = State::Done;
        _longjmp(group->scheduler, 1);
    }

    __attribute__((noinline)) void wait(State state) {
        Fiber& fiber = fibers[current];
        fiber.state = state;
        if (_setjmp(fiber.place)) return; // resumed
        _longjmp(scheduler, 1);
    }
};

}  // namespace shim
