// How the fibers of shim/fibers.h are made and take turns: once in a library, not in each of its files.
#include "shim/fibers.h"

#include <algorithm>
#include <random>
#include <stdexcept>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace shim {

State the_state;

static void enter() {
  Fiber &f = self();
  f.block->run(f.block->body);
  // No wait of the thread has covered these: on a GPU they may land whenever, over what was written there since.
  if (!f.copies.empty() && f.block->error.empty()) f.block->error = "copies in the background are in no group";
  f.done = true;
  pause();
  std::abort();
}

static void prepare(Fiber &f, unsigned char *stack) {
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

void fail(const std::string &why) {
  if (state().scheduling) throw std::runtime_error(why);
  Fiber &f = self();
  if (f.block->error.empty()) f.block->error = why;
  f.wait = Wait::never;
  for (;;) pause();
}

static void *array_of(Block &b, const void *site, size_t bytes) {
  for (Array &array : b.arrays)
    if (array.site == site) return array.bytes.data();
  b.arrays.push_back({site, std::vector<unsigned char>(bytes, 0xff)});
  return b.arrays.back().bytes.data();
}

void *shared_array(const void *site, size_t bytes) { return array_of(*self().block, site, bytes); }

void *in_cluster(const void *mine, int rank) {
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

static std::vector<int64_t> ordered(int64_t count, unsigned order) {
  std::vector<int64_t> result(count);
  for (int64_t i = 0; i < count; i++) result[i] = order == 1 ? count - 1 - i : i;
  if (order > 1) std::shuffle(result.begin(), result.end(), std::mt19937(order));
  return result;
}

// Lets everybody who waits at the block's barrier go on if all who are left stand there.
static bool release(Block &b) {
  if (b.alive == 0 || b.at_barrier != b.alive) return false;
  b.at_barrier = 0;
  b.voted = b.votes;
  b.votes = 0;
  for (Fiber &f : b.fibers)
    if (f.wait == Wait::block) f.wait = Wait::none;
  return true;
}

// Lets everybody who waits at the cluster's barrier go on if all who are left in its blocks stand there.
static bool release_cluster(std::vector<Block> &blocks) {
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
static bool take_turns(Block &b, const int64_t *first, const int64_t *last) {
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

static bool progress(Block &b) {
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
static bool run_block(Block &b, const std::vector<int64_t> &order) {
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
static void run_cluster(std::vector<Block> &blocks) {
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

static void make_fibers(std::vector<Block> &blocks) {
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

std::string run_grid(dim3 grid, dim3 size, size_t shared_bytes, const void *body, void (*run)(const void *), int cluster) {
  const int64_t clusters = int64_t(grid.x) * grid.y * grid.z / cluster;
  for (int64_t i : ordered(clusters, state().order)) {
    std::vector<Block> blocks(cluster);
    for (int64_t rank = 0, at = i * cluster; rank < cluster; rank++, at++) {
      Block &b = blocks[rank];
      b.index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
      b.size = size;
      b.grid = grid;
      b.dynamic.assign(shared_bytes, 0xff);
      b.body = body;
      b.run = run;
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
