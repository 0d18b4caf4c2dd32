// Bodies of common/hopper.cuh for the CPU. What a GPU does in the background is done as late as the waiting allows or at once
// (State::order): copies late in an even order, so that a missed wait reads what was there before, and at once in an odd one, so that
// a copy over what others still read shows. Barriers keep their phases, arrivals and bytes; more arrivals than they count, threads of
// a block that are never woken, and stores that a matrix instruction may not see yet are errors.
#pragma once
#include <functional>
#include <map>
#include <unordered_map>

#include "common/common.cuh"

#define MEGALM_HOPPER
#define MEGALM_CONSTANT const

namespace shim {

constexpr int REGISTER_FILE = 65536;

struct Phase {
  int arrivals, pending;
  int64_t bytes = 0;
  unsigned number = 0;
};
struct Named { int threads = 0, arrived = 0; };

struct Waiting { Fiber *fiber; const void *barrier; unsigned parity; };

// What one block has under way.
struct Background {
  std::map<const void *, Phase> phases;
  Named named[16];
  std::vector<Waiting> waiting;
  std::deque<std::function<void()>> copies;
  std::unordered_map<uintptr_t, int> unfenced;  // 16-byte units: how many ordinary stores to them no fence covers yet
  std::map<Fiber *, std::vector<uintptr_t>> stores;  // the units that each thread wrote since its last fence
  std::map<Fiber *, int> registers;
  std::shared_ptr<void> matrices;                             // shim/wgmma.h has
  bool (*finish_matrices)(Block &) = nullptr;                 // what was waited for; whether there was anything
  std::string (*matrices_left)(Block &) = nullptr;            // an error, or an empty string
};

inline Background &background() {
  Block &b = *self().block;
  if (!b.background) {
    const auto made = std::make_shared<Background>();
    b.background = made;
    b.progress = [](Block &block) {
      Background &it = *static_cast<Background *>(block.background.get());
      if (it.finish_matrices != nullptr && it.finish_matrices(block)) return true;
      if (it.copies.empty()) return false;
      const auto copy = std::move(it.copies.front());
      it.copies.pop_front();
      copy();
      return true;
    };
    b.finish = [](Block &block) {
      Background &it = *static_cast<Background *>(block.background.get());
      if (!it.copies.empty()) return std::string("a copy was never waited for");
      for (const Named &named : it.named)
        if (named.arrived) return std::string("threads arrived at a named barrier that nobody waits for");
      int64_t registers = 0;
      for (const auto &[fiber, count] : it.registers) registers += count;
      if (registers > REGISTER_FILE / int64_t(block.fibers.size()) / 8 * 8 * int64_t(block.fibers.size()))
        return std::string("the warpgroups ask for more registers than the launch has");
      return it.matrices_left == nullptr ? std::string() : it.matrices_left(block);
    };
  }
  return *static_cast<Background *>(b.background.get());
}

// Shared memory as a GPU addresses it: from 0, where `dynamic` begins at a multiple of 16.
inline unsigned char *shared_base() { return self().block->dynamic.data(); }

inline Phase &phase_of(const uint64_t *barrier) {
  auto &phases = background().phases;
  const auto found = phases.find(barrier);
  if (found == phases.end()) fail("a barrier is used that was never started");
  return found->second;
}

// Ends the phase if nothing is missing, and wakes who waits for its end.
inline void end_phase(const void *barrier, Phase &phase) {
  if (phase.pending || phase.bytes) return;
  phase.number++;
  phase.pending = phase.arrivals;
  auto &waiting = background().waiting;
  const auto woken = std::partition(waiting.begin(), waiting.end(),
                                    [&](const Waiting &w) { return w.barrier != barrier || phase.number % 2 == w.parity; });
  for (auto w = woken; w != waiting.end(); ++w) w->fiber->wait = Wait::none;
  waiting.erase(woken, waiting.end());
}

inline void arrive(uint64_t *barrier, int bytes) {
  Phase &phase = phase_of(barrier);
  if (phase.pending-- == 0) fail("more arrivals at a barrier than its phase counts");
  phase.bytes += bytes;
  end_phase(barrier, phase);
}

inline void check_units(const void *start, size_t bytes, const char *who) {
  auto &unfenced = background().unfenced;
  if (unfenced.empty()) return;
  for (uintptr_t unit = reinterpret_cast<uintptr_t>(start) / 16; unit <= (reinterpret_cast<uintptr_t>(start) + bytes - 1) / 16; unit++)
    if (unfenced.count(unit)) fail(std::string(who) + " uses shared memory whose stores no fence_async covers");
}

}  // namespace shim

inline uint32_t shared_offset(const void *pointer) { return uint32_t(static_cast<const unsigned char *>(pointer) - shim::shared_base()); }

namespace shim {
// The 128-byte swizzle: 16-byte chunks of a row of 128 bytes by the row's number in its eight.
inline uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

inline unsigned char *shared_at(uint32_t offset) {
  if (offset >= self().block->dynamic.size()) fail("an address beyond shared memory");
  return shared_base() + offset;
}
}  // namespace shim

inline void barrier_start(uint64_t *barrier, int arrivals) { shim::background().phases[barrier] = {arrivals, arrivals}; }
inline void barriers_started() {}
inline void barrier_arrive(uint64_t *barrier) { shim::arrive(barrier, 0); }
inline void barrier_expect(uint64_t *barrier, int bytes) { shim::arrive(barrier, bytes); }
inline void barrier_wait(uint64_t *barrier, int parity) {
  if (int(shim::phase_of(barrier).number % 2) != parity) return;
  shim::Fiber &f = shim::self();
  f.wait = shim::Wait::phase;
  shim::background().waiting.push_back({&f, barrier, unsigned(parity)});
  while (f.wait != shim::Wait::none) shim::pause();
}

inline void tensor_load(void *to, const TensorMap &map, uint64_t *barrier, int column, int row, int head, int batch) {
  const uint32_t start = shared_offset(to);
  if (start % 128) shim::fail("a box starts at an address that is no multiple of 128");
  shim::check_units(to, size_t(map.rows) * PANEL_ROW, "the copy engine");
  unsigned char *const base = shim::shared_base();
  const size_t size = shim::self().block->dynamic.size();
  shim::Phase &phase = shim::phase_of(barrier);
  const auto copy = [=, &phase] {
    for (int r = 0; r < map.rows; r++)
      for (int c = 0; c < PANEL_ROW / map.element; c++) {
        const int64_t at[4] = {column + c, row + r, head, batch};
        bool inside = true;
        const unsigned char *from = map.base;
        for (int dim = 0; dim < 4; dim++) {
          inside = inside && at[dim] >= 0 && at[dim] < map.size[dim];
          from += at[dim] * map.stride[dim];
        }
        const uint32_t offset = shim::swizzled(start + r * PANEL_ROW + c * map.element);
        if (offset + map.element > size) shim::fail("a box goes beyond shared memory");
        if (inside) std::memcpy(base + offset, from, map.element);
        else std::memset(base + offset, 0, map.element);
      }
    phase.bytes -= map.rows * PANEL_ROW;
    shim::end_phase(barrier, phase);
  };
  if (shim::state().order % 2 == 1) copy();
  else shim::background().copies.push_back(copy);
}

inline void fence_async() {
  auto &unfenced = shim::background().unfenced;
  auto &stores = shim::background().stores[&shim::self()];
  for (uintptr_t unit : stores)
    if (--unfenced[unit] == 0) unfenced.erase(unit);
  stores.clear();
}
inline void store_operand(void *to, uint32_t word) {
  std::memcpy(to, &word, 4);
  const uintptr_t unit = reinterpret_cast<uintptr_t>(to) / 16;
  shim::background().unfenced[unit]++;
  shim::background().stores[&shim::self()].push_back(unit);
}

namespace shim {
inline void at_named(int id, int threads, bool wait) {
  Named &named = background().named[id];
  if (id < 1 || id > 15 || (named.arrived && named.threads != threads)) fail("threads disagree on a named barrier");
  named.threads = threads;
  Fiber &f = self();
  if (wait) {
    f.wait = Wait::named;
    f.named = id;
  }
  if (++named.arrived == threads) {
    named.arrived = 0;
    for (Fiber &other : f.block->fibers)
      if (other.wait == Wait::named && other.named == id) other.wait = Wait::none;
  }
  while (f.wait != Wait::none) pause();
}
}  // namespace shim
inline void named_wait(int id, int threads) { shim::at_named(id, threads, true); }
inline void named_arrive(int id, int threads) { shim::at_named(id, threads, false); }

template <int COUNT> void fewer_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
  shim::background().registers[&shim::self()] = COUNT;
}
template <int COUNT> void more_registers() { fewer_registers<COUNT>(); }

inline void add_to(float *to, const float (&values)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16) shim::fail("a sum of four at an address that is no multiple of 16");
  for (int i = 0; i < 4; i++) to[i] += values[i];
}
// Blocks run one after the other here: one that waits for another that comes later would wait for ever.
inline void turn_wait(const int *number, int value) {
  if (*number < value) shim::fail("a block waits for the turn of one that may come after it");
}
inline void turn_pass(int *number) { ++*number; }
inline int take_ticket(int *next) { return (*next)++; }
