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
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
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
inline State &state() { static State it; return it; }
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

inline void enter() {
  Fiber &f = self();
  f.block->run(f.block->body);
  // No wait of the thread has covered these: on a GPU they may land whenever, over what was written there since.
  if (!f.copies.empty() && f.block->error.empty()) f.block->error = "copies in the background are in no group";
  f.done = true;
  pause();
  std::abort();
}

inline void prepare(Fiber &f, unsigned char *stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, STACK_BYTES);  // the last fiber there never returned from its frames
#endif
#if defined(__x86_64__)
  void **top = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(stack) + STACK_BYTES) & ~uintptr_t(63));
  *--top = nullptr;  // as if called: the stack is 8 beyond a multiple of 16 on entry
  *--top = reinterpret_cast<void *>(enter);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  f.stack_pointer = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = STACK_BYTES;
  f.context.uc_link = nullptr;
  makecontext(&f.context, enter, 0);
#endif
}

// The calling fiber's block is given up; the fiber never runs again.
[[noreturn]] inline void fail(const std::string &why) {
  if (state().scheduling) throw std::runtime_error(why);
  Fiber &f = self();
  if (f.block->error.empty()) f.block->error = why;
  f.wait = Wait::never;
  for (;;) pause();
}

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

inline void *array_of(Block &b, const void *site, size_t bytes) {
  for (Array &array : b.arrays)
    if (array.site == site) return array.bytes.data();
  b.arrays.push_back({site, std::vector<unsigned char>(bytes, 0xff)});
  return b.arrays.back().bytes.data();
}

// The block's array of a declaration, NaN when the block first comes there.
inline void *shared_array(const void *site, size_t bytes) { return array_of(*self().block, site, bytes); }

// Where block `rank` of the cluster has what the caller's has at `mine`. One that may not have begun or has left has nothing there.
inline void *in_cluster(const void *mine, int rank) {
  Block &b = *self().block;
  if (rank < 0 || rank >= b.blocks) fail("a block that the cluster does not have is written to");
  Block &other = b.cluster[rank];
  if (!other.started) fail("a block of the cluster is written to that may not have begun");
  if (other.alive == 0) fail("a block of the cluster is written to that has left");
  const auto *place = static_cast<const unsigned char *>(mine);
  for (const Array &array : b.arrays) {
    const auto *first = array.bytes.data();
    if (place >= first && place < first + array.bytes.size())
      return static_cast<unsigned char *>(array_of(other, array.site, array.bytes.size())) + (place - first);
  }
  fail("what a cluster shares is no shared memory");
}

inline std::vector<int64_t> ordered(int64_t count, unsigned order) {
  std::vector<int64_t> result(count);
  for (int64_t i = 0; i < count; i++) result[i] = order == 1 ? count - 1 - i : i;
  if (order > 1) std::shuffle(result.begin(), result.end(), std::mt19937(order));
  return result;
}

// Lets everybody who waits at the block's barrier go on if all who are left stand there.
inline bool release(Block &b) {
  if (b.alive == 0 || b.at_barrier != b.alive) return false;
  b.at_barrier = 0;
  b.voted = b.votes;
  b.votes = 0;
  for (Fiber &f : b.fibers)
    if (f.wait == Wait::block) f.wait = Wait::none;
  return true;
}

// Lets everybody who waits at the cluster's barrier go on if all who are left in its blocks stand there.
inline bool release_cluster(std::vector<Block> &blocks) {
  int alive = 0, waiting = 0;
  for (const Block &b : blocks) alive += b.alive, waiting += b.at_cluster;
  if (alive == 0 || waiting != alive) return false;
  for (Block &b : blocks) {
    b.at_cluster = 0;
    for (Fiber &f : b.fibers)
      if (f.wait == Wait::cluster) f.wait = Wait::none;
  }
  return true;
}

// One turn of each of these threads that can go on; whether any could.
inline bool take_turns(Block &b, const int64_t *first, const int64_t *last) {
  bool moved = false;
  for (const int64_t *index = first; index != last && b.error.empty(); index++) {
    Fiber &f = b.fibers[*index];
    if (f.done || f.wait != Wait::none) continue;
    moved = b.started = true;
    resume(f);
    if (!f.done) continue;
    b.alive--;
    f.warp->present &= ~(1u << f.lane);
  }
  return moved;
}

inline bool progress(Block &b) {
  if (b.progress == nullptr || b.alive == 0) return false;
  state().scheduling = true;
  bool moved = false;
  try {
    moved = b.progress(b);
  } catch (const std::runtime_error &error) {
    b.error = error.what();
  }
  state().scheduling = false;
  return moved;
}

// One turn of the block's threads, each warp as far ahead as it can in an odd order; whether any could go on.
inline bool run_block(Block &b, const std::vector<int64_t> &order) {
  const bool ahead = state().order % 2 == 1;
  bool moved = false;
  for (size_t at = 0, next; at < order.size(); at = next) {
    next = order.size();
    if (ahead) for (next = at + 1; next < order.size() && order[next] / LANES == order[at] / LANES;) next++;
    while (take_turns(b, order.data() + at, order.data() + next)) {
      moved = true;
      if (!ahead) break;
    }
  }
  return release(b) || moved;
}

// The blocks of a cluster to their end, in an odd order each as far ahead of the others as it can; what is wrong is in one's `error`.
inline void run_cluster(std::vector<Block> &blocks) {
  const auto ranks = ordered(int64_t(blocks.size()), state().order);
  std::vector<int64_t> order = ordered(int64_t(blocks[0].fibers.size()), state().order);
  const bool ahead = state().order % 2 == 1;
  const auto warp_rank = ordered(int64_t(blocks[0].warps.size()), state().order);
  if (ahead)
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t c) { return warp_rank[a / LANES] < warp_rank[c / LANES]; });
  for (;;) {
    bool moved = false;
    int alive = 0;
    for (int64_t rank : ranks) {
      Block &b = blocks[rank];
      while (run_block(b, order)) {
        moved = true;
        if (!ahead) break;
      }
      if (!b.error.empty()) return;
      alive += b.alive;
    }
    if (alive == 0) break;
    if (release_cluster(blocks) || moved) continue;
    for (Block &b : blocks) moved = progress(b) || moved;
    for (const Block &b : blocks) if (!b.error.empty()) return;
    if (!moved) {
      blocks[0].error = "deadlock: some threads of a block wait where the others never come";
      return;
    }
  }
  for (Block &b : blocks) if (b.finish != nullptr) b.error = b.finish(b);
}

inline void make_fibers(std::vector<Block> &blocks) {
  const dim3 size = blocks[0].size;
  const int count = int(size.x * size.y * size.z);
  if (state().stacks_bytes < blocks.size() * count * STACK_BYTES) {
    state().stacks_bytes = blocks.size() * count * STACK_BYTES;
    state().stacks.reset(new unsigned char[state().stacks_bytes]);
  }
  unsigned char *stack = state().stacks.get();
  for (Block &b : blocks) {
    b.cluster = blocks.data();
    b.blocks = int(blocks.size());
    b.fibers.resize(count);
    b.warps.resize((count + LANES - 1) / LANES);
    b.alive = count;
    for (int t = 0; t < count; t++, stack += STACK_BYTES) {
      Fiber &f = b.fibers[t];
      f.thread = dim3(t % size.x, t / size.x % size.y, t / size.x / size.y);
      f.lane = t % LANES;
      f.warp = &b.warps[t / LANES];
      f.warp->present |= 1u << f.lane;
      f.block = &b;
      prepare(f, stack);
    }
  }
}

// Runs the body for every thread of every block, `cluster` neighbours in x at once; returns what is wrong, or an empty string.
template <class Body> std::string run_grid(dim3 grid, dim3 size, size_t shared_bytes, const Body &body, int cluster) {
  const int64_t clusters = int64_t(grid.x) * grid.y * grid.z / cluster;
  for (int64_t i : ordered(clusters, state().order)) {
    std::vector<Block> blocks(cluster);
    for (int64_t rank = 0, at = i * cluster; rank < cluster; rank++, at++) {
      Block &b = blocks[rank];
      b.index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
      b.size = size;
      b.grid = grid;
      b.dynamic.assign(shared_bytes, 0xff);
      b.body = &body;
      b.run = [](const void *it) { (*static_cast<const Body *>(it))(); };
    }
    make_fibers(blocks);
    run_cluster(blocks);
    for (const Block &b : blocks)
      if (!b.error.empty())
        return b.error + " (block " + std::to_string(b.index.x) + ", " + std::to_string(b.index.y) + ", " + std::to_string(b.index.z) + ")";
  }
  return "";
}

}  // namespace shim
