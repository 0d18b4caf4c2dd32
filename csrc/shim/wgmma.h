// Bodies of common/wgmma.cuh for the CPU. An instruction belongs to the 128 threads of a warpgroup, who must all issue the same. It
// reads shared memory through its descriptors and writes its accumulator when it is waited for: with what is there then (order % 4 is
// not 3: after everybody else has done what they can), or with what was there when it was issued (3). Until then the accumulator is NaN.
#pragma once
#include "common/hopper.cuh"

namespace shim {

constexpr int GROUP = 128, ROWS = 64, OPERAND_BYTES = 32;  // of a row of an operand

// One instruction of a warpgroup.
struct Product {
  int columns;
  int size;                     // bytes of an operand's element
  float (*value)(const void *);  // its value
  bool add, a_shared, a_across, b_across;
  uint64_t a, b;
  const uint32_t *registers[GROUP] = {};  // of the left operand, by thread
  int issued = 0;
  std::vector<float> left, right;  // [64][depth], [columns][depth], once they are read
  int depth() const { return OPERAND_BYTES / size; }
  bool same(const Product &other) const {
    return columns == other.columns && add == other.add && a_shared == other.a_shared && a_across == other.a_across &&
           b_across == other.b_across && (!a_shared || a == other.a) && b == other.b;
  }
};

struct Issued { std::shared_ptr<Product> product; float *to; };
struct Sum { std::vector<float> values; int under_way = 0; };

// Of a thread.
struct Thread {
  size_t count = 0;  // instructions so far
  bool fenced = false;
  std::vector<Issued> open;
  std::deque<std::vector<Issued>> groups;
  std::map<float *, Sum> sums;
  size_t leave = 0;  // groups that may be under way when it goes on
};

struct Matrices {
  std::map<int, std::vector<std::shared_ptr<Product>>> products;  // by warpgroup
  std::vector<Thread> threads;
};

inline int number_of(const Fiber &f) { return int(&f - f.block->fibers.data()); }
inline bool reads_at_once() { return state().order % 4 == 3; }

template <typename T> float value_of(const void *from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return float(value);
}
template <> inline float value_of<e4m3>(const void *from) { return from_e4m3(*static_cast<const uint8_t *>(from)); }

// An operand [count][depth] (its own rows or columns first) through its descriptor: PTX ISA, canonical layouts of the 128-byte swizzle.
inline std::vector<float> read_operand(const Product &p, uint64_t descriptor, int count, bool across) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
  if ((start >> 7 & 7) != 0) fail("a descriptor that starts within eight rows");
  if (across && p.size != 2) fail("an operand of bytes that is read across");
  std::vector<float> values(count * p.depth());
  for (int i = 0; i < count; i++)
    for (int k = 0; k < p.depth(); k++) {
      const uint32_t along = i % 8 * 128 + i / 8 * stride + k * p.size, over = i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride;
      const unsigned char *const at = shared_at(swizzled(start + (across ? over : along)));
      check_units(at, p.size, "a matrix instruction");
      values[i * p.depth() + k] = p.value(at);
    }
  return values;
}

inline void read_shared(Product &p) {
  if (!p.right.empty()) return;
  p.right = read_operand(p, p.b, p.columns, p.b_across);
  if (p.a_shared) p.left = read_operand(p, p.a, ROWS, p.a_across);
}

// The left operand in all threads' registers: the fragments are those of "wgmma.mma_async.m64nNk16" and ".m64nNk32", where a register
// has two or four neighbours of a row.
inline void read_registers(Product &p) {
  if (!p.left.empty()) return;
  p.left.resize(ROWS * p.depth());
  const int each = 4 / p.size;
  for (int thread = 0; thread < GROUP; thread++)
    for (int i = 0; i < 4; i++)
      for (int place = 0; place < each; place++) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8, k = thread % 4 * each + place + i / 2 * 4 * each;
        const uint32_t bits = p.registers[thread][i] >> 8 * p.size * place;
        p.left[row * p.depth() + k] = p.value(&bits);
      }
}

// A sum of an instruction of bytes, of products and what is there. Hopper's keeps about 14 bits: every number is shifted to the largest's
// exponent, and what falls off is lost (DeepSeek-V3, 2024, section 3.3.2; toward zero: Fasi et al., "Numerical behavior of NVIDIA tensor
// cores", 2021, who saw it in wider types).
constexpr int KEPT_BITS = 14;
inline float sum_of_bytes(float sum, const float *a, const float *b, int depth) {
  int largest = 0;
  for (int k = -1; k < depth; k++) {
    const int exponent = bits_of(k < 0 ? sum : a[k] * b[k]) >> 23 & 0xff;
    if (exponent > largest) largest = exponent;
  }
  if (largest == 0 || largest == 0xff) {
    for (int k = 0; k < depth; k++) sum += a[k] * b[k];
    return sum;
  }
  const int shift = 127 + KEPT_BITS - 1 - largest;  // the largest comes to lie in [2^13, 2^14)
  int64_t kept = int64_t(std::ldexp(sum, shift));
  for (int k = 0; k < depth; k++) kept += int64_t(std::ldexp(a[k] * b[k], shift));
  return std::ldexp(float(kept), -shift);
}

// This thread's part of a product, onto its sum; the accumulator gets it once no instruction on it is under way.
inline void finish_product(Fiber &f, Thread &thread, const Issued &issued) {
  Product &p = *issued.product;
  if (p.issued != GROUP) fail("the threads of a warpgroup don't all issue a matrix instruction");
  read_shared(p);
  read_registers(p);
  const int number = number_of(f) % GROUP, first = number / 32 * 16 + number % 32 / 4, t = number % 4;
  Sum &sum = thread.sums[issued.to];
  for (int n = 0; n < p.columns / 8; n++)
    for (int i = 0; i < 4; i++) {
      const float *const a = &p.left[(first + i / 2 * 8) * p.depth()], *const b = &p.right[(n * 8 + t * 2 + i % 2) * p.depth()];
      float value = p.add ? sum.values[n * 4 + i] : 0.0f;
      if (p.size == 1) value = sum_of_bytes(value, a, b, p.depth());
      else
        for (int k = 0; k < p.depth(); k++) value += a[k] * b[k];
      sum.values[n * 4 + i] = value;
    }
  if (--sum.under_way > 0) return;
  std::memcpy(issued.to, sum.values.data(), sum.values.size() * sizeof(float));
  thread.sums.erase(issued.to);
}

inline bool finish_matrices(Block &b) {
  Matrices &all = *static_cast<Matrices *>(static_cast<Background *>(b.background.get())->matrices.get());
  std::vector<Fiber *> waiting;
  for (Fiber &f : b.fibers)
    if (f.wait == Wait::matrix) waiting.push_back(&f);
  for (Fiber *f : waiting) {
    Thread &thread = all.threads[number_of(*f)];
    for (; thread.groups.size() > thread.leave; thread.groups.pop_front())
      for (const Issued &issued : thread.groups.front()) finish_product(*f, thread, issued);
  }
  for (Fiber *f : waiting) f->wait = Wait::none;
  return !waiting.empty();
}

inline std::string matrices_left(Block &b) {
  for (const Thread &thread : static_cast<Matrices *>(static_cast<Background *>(b.background.get())->matrices.get())->threads)
    if (!thread.open.empty() || !thread.groups.empty()) return "a matrix instruction was never waited for";
  return "";
}

inline Matrices &matrices() {
  Background &here = background();
  if (!here.matrices) {
    const auto made = std::make_shared<Matrices>();
    made->threads.resize(self().block->fibers.size());
    here.matrices = made;
    here.finish_matrices = finish_matrices;
    here.matrices_left = matrices_left;
  }
  return *static_cast<Matrices *>(here.matrices.get());
}
inline Thread &this_thread() { return matrices().threads[number_of(self())]; }

inline void issue(const Product &wanted, float *to, const uint32_t *registers) {
  const int number = number_of(self());
  Thread &thread = this_thread();
  if (!thread.fenced) fail("a matrix instruction without a fence since the last wait");
  auto &products = matrices().products[number / GROUP];
  if (products.size() == thread.count) products.push_back(std::make_shared<Product>(wanted));
  const auto product = products[thread.count++];
  if (!product->same(wanted)) fail("the threads of a warpgroup disagree on a matrix instruction");
  product->registers[number % GROUP] = registers;
  product->issued++;
  Sum &sum = thread.sums[to];
  if (sum.under_way++ == 0) sum.values.assign(to, to + wanted.columns / 2);
  std::fill(to, to + wanted.columns / 2, float_of(0x7fc00000));
  thread.open.push_back({product, to});
  if (reads_at_once()) read_shared(*product);
}

}  // namespace shim

inline void matrix_fence() { shim::this_thread().fenced = true; }
inline void matrix_commit() {
  shim::Thread &thread = shim::this_thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int N> void matrix_wait() {
  shim::Thread &thread = shim::this_thread();
  thread.fenced = false;
  thread.leave = N;
  if (thread.groups.size() <= N) return;
  shim::self().wait = shim::Wait::matrix;
  while (shim::self().wait != shim::Wait::none) shim::pause();
}
template <int TILES> void matrix_settle(float (&d)[TILES][4]) {
  if (shim::this_thread().sums.count(&d[0][0])) shim::fail("an accumulator is used that a matrix instruction still writes");
}

template <typename T, int N> struct Multiply {
  template <bool ADD, Order A, Order B> static void shared(float (&d)[N / 8][4], uint64_t a, uint64_t b) {
    shim::issue({N, sizeof(T), shim::value_of<T>, ADD, true, A == Order::across, B == Order::across, a, b}, &d[0][0], nullptr);
  }
  template <bool ADD, Order B> static void registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {
    shim::issue({N, sizeof(T), shim::value_of<T>, ADD, false, false, B == Order::across, 0, b}, &d[0][0], a);
  }
};
