// One block of CUDA threads on one CPU thread: a fiber each, which runs until it waits for others.
//
// What a GPU may do in any order is done in a chosen one (State::order), so that a missing barrier shows. A block in which nobody can
// go on, lanes that disagree on a collective, and a collective that names a lane that isn't there are errors, as on a GPU they would
// hang or give garbage. Shared memory is one allocation an array, filled with NaN, so that AddressSanitizer sees its ends.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr size_t STACK_BYTES = 96 * 1024;
constexpr int LANES = 32, SLOT_BYTES = 32;
enum class Wait { none, block, cluster, warp, named, phase, matrix, never };  // named, phase, matrix: shim/hopper.h

struct Warp {
  uint32_t present = 0, arrived = 0, mask = 0;
  alignas(16) unsigned char slots[2][LANES][SLOT_BYTES];  // two, as a fast lane may publish again before a slow one has read
};

// A copy in the background: 16 bytes, or zeros where it isn't valid.
struct Copy {
  void *to;
  const void *from;
  size_t bytes;
  bool valid;
  void make() const {
    if (valid) std::memcpy(to, from, bytes);
    else std::memset(to, 0, bytes);
  }
};

struct Block;
struct Fiber {
  dim3 thread;
  int lane = 0;
  Warp *warp = nullptr;
  Block *block = nullptr;
  Wait wait = Wait::none;
  bool done = false;
  int parity = 0, named = 0;  // named: the number of the barrier that it waits at
  std::vector<Copy> copies;               // started, in no group yet
  std::deque<std::vector<Copy>> groups;   // not waited for yet
#if defined(__x86_64__)
  void *stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Array { const void *site; std::vector<unsigned char> bytes; };

struct Block {
  dim3 index, size, grid;
  Block *cluster = nullptr;  // all blocks of the cluster, a block alone being one
  int blocks = 1;
  bool started = false;
  int alive = 0, at_barrier = 0, at_cluster = 0, votes = 0, voted = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Array> arrays;
  std::vector<unsigned char> dynamic;
  const void *body = nullptr;
  void (*run)(const void *) = nullptr;
  std::string error;
  std::shared_ptr<void> background;       // what shim/hopper.h keeps of a block
  bool (*progress)(Block &) = nullptr;     // where no thread can go on: whether something in the background came about
  std::string (*finish)(Block &) = nullptr;  // what is wrong once all threads have left
#if defined(__x86_64__)
  void *scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
};

struct State {
  Fiber *fiber = nullptr;
  std::string error;     // of the last launch that failed
  // 0: threads and blocks ascending, 1: descending, else the seed of a random order. In an even one the threads take turns; in an
  // odd one a warp runs as far ahead as it can.
  unsigned order = 0;
  bool scheduling = false;  // no fiber runs
  std::unique_ptr<unsigned char[]> stacks;
  size_t stacks_bytes = 0;
};
extern State the_state;
inline State &state() { return the_state; }
inline Fiber &self() { return *state().fiber; }

#if defined(__x86_64__)
// Saves the callee's registers and stack at *from and goes on at `to` (System V AMD64 ABI, section 3.2.1).
__attribute__((naked, noinline)) inline void switch_stack(void **from, void *to) {
  __asm__ volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
inline void pause() { Fiber &f = self(); switch_stack(&f.stack_pointer, f.block->scheduler); }
inline void resume(Fiber &f) { state().fiber = &f; switch_stack(&f.block->scheduler, f.stack_pointer); }
#else
inline void pause() { Fiber &f = self(); swapcontext(&f.context, &f.block->scheduler); }
inline void resume(Fiber &f) { state().fiber = &f; swapcontext(&f.block->scheduler, &f.context); }
#endif

// The calling fiber's block is given up; the fiber never runs again.
[[noreturn]] void fail(const std::string &why);

inline int barrier(int vote) {
  Fiber &f = self();
  f.block->votes += vote != 0;
  f.block->at_barrier++;
  f.wait = Wait::block;
  while (f.wait != Wait::none) pause();
  return f.block->voted;
}

// Publishes `bytes` of `value` and returns all lanes' slots once every lane of the mask has published.
inline const unsigned char (*exchange(uint32_t mask, const void *value, size_t bytes))[SLOT_BYTES] {
  Fiber &f = self();
  Warp &w = *f.warp;
  if (!(mask >> f.lane & 1)) fail("a warp collective's mask does not name the calling lane");
  if (mask & ~w.present) fail("a warp collective names a lane that has left or never was");
  if (w.arrived && w.mask != mask) fail("the lanes of a warp disagree on the mask of a collective");
  auto &slots = w.slots[f.parity ^= 1];
  std::memcpy(slots[f.lane], value, bytes);
  w.mask = mask;
  w.arrived |= 1u << f.lane;
  f.wait = Wait::warp;
  if (w.arrived == mask) {
    w.arrived = 0;
    Fiber *first = &f - f.lane;
    for (int lane = 0; lane < LANES; lane++)
      if (mask >> lane & 1) first[lane].wait = Wait::none;
  }
  while (f.wait != Wait::none) pause();
  return slots;
}

inline void cluster_barrier() {
  Fiber &f = self();
  f.block->at_cluster++;
  f.wait = Wait::cluster;
  while (f.wait != Wait::none) pause();
}

// The block's array of a declaration, NaN when the block first comes there.
void *shared_array(const void *site, size_t bytes);

// Where block `rank` of the cluster has what the caller's has at `mine`. One that may not have begun or has left has nothing there.
void *in_cluster(const void *mine, int rank);

// `run(body)` for every thread of every block, `cluster` neighbours in x at once; returns what is wrong, or an empty string.
std::string run_grid(dim3 grid, dim3 size, size_t shared_bytes, const void *body, void (*run)(const void *), int cluster);

}  // namespace shim
