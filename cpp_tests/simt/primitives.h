#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "engine.h"

// The harness's half of csrc/cuda/simt.cuh: the same names, run by engine.h.

#define CSP_DEVICE inline
#define CSP_KERNEL(threads, blocks)
#define CSP_SHARED(type, name, count)                        \
  const auto name = ::csp::simt::static_shared<type, count>( \
      [] {                                                   \
        static char key;                                     \
        return &key;                                         \
      }(),                                                   \
      #name)
#define CSP_UNROLL
#define CSP_NO_UNROLL

namespace csp::simt {

struct Half {
  _Float16 value;
  Half() = default;
  explicit Half(float x)
      : value(x == x ? static_cast<_Float16>(x) : __builtin_bit_cast(_Float16, uint16_t{0x7fff})) {}
};

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float x) {
    const auto word = __builtin_bit_cast(uint32_t, x);
    bits = static_cast<uint16_t>(x != x ? 0x7fffu : (word + 0x7fffu + (word >> 16 & 1u)) >> 16);
  }
};

// ---- memory: pointers that check each access ----

// An index, and the line that it is used on.
struct Index {
  template <typename I>
    requires(std::is_convertible_v<I, int64_t>)
  Index(I i, const Site& site = Site::current()) : i(static_cast<int64_t>(static_cast<I&&>(i))), site(site) {}
  int64_t i;
  Site site;
};

// One element. Reading converts, so it is kept in a typed variable; one in `auto` can be neither read nor
// written.
template <typename T>
class Reference {
  static_assert(alignof(T) <= 16);

 public:
  using Value = std::remove_const_t<T>;
  Reference(Allocation* allocation, T* address, const Site& site)
      : allocation_(allocation), address_(address), site_(site) {}
  Reference(const Reference&) = default;
  operator Value() && { return read(); }
  operator Reference<const T>() &&
    requires(!std::is_const_v<T>)
  {
    return {allocation_, address_, site_};
  }
  Reference operator=(const Value& value) && { return write(value); }
  Reference operator=(Reference&& other) && { return write(other.read()); }
  Reference operator+=(const Value& value) && { return write(read() + value); }
  Reference operator-=(const Value& value) && { return write(read() - value); }
  Reference operator|=(const Value& value) && { return write(read() | value); }

 private:
  Value read() const {
    allocation_->read(address_, sizeof(T), alignof(T), site_);
    return *address_;
  }
  Reference write(const Value& value) const {
    allocation_->write(address_, sizeof(T), alignof(T), site_);
    *address_ = value;
    return *this;
  }

  Allocation* allocation_;
  T* address_;
  Site site_;
};

template <typename T>
class Pointer {
 public:
  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(Allocation* allocation, T* address) : allocation_(allocation), address_(address) {}
  // To const.
  template <typename U>
    requires(std::is_same_v<const U, T> && !std::is_const_v<U>)
  Pointer(const Pointer<U>& other) : allocation_(other.allocation()), address_(other.address()) {}

  Reference<T> operator[](const Index& index) const { return {allocation_, address_ + index.i, index.site}; }
  Reference<T> operator*() const { return {allocation_, address_, {}}; }
  Pointer operator+(int64_t i) const { return {allocation_, address_ + i}; }
  Pointer operator-(int64_t i) const { return {allocation_, address_ - i}; }
  Pointer& operator+=(int64_t i) {
    address_ += i;
    return *this;
  }
  friend bool operator==(const Pointer& p, std::nullptr_t) { return p.address_ == nullptr; }
  friend bool operator==(const Pointer& p, const Pointer& q) { return p.address_ == q.address_; }

  Allocation* allocation() const { return allocation_; }
  T* address() const { return address_; }

 private:
  Allocation* allocation_ = nullptr;
  T* address_ = nullptr;
};

template <typename T>
using Global = Pointer<T>;
template <typename T>
using Shared = Pointer<T>;

template <typename T>
Pointer<T> global(void* pointer) {
  return {allocation_at(pointer), static_cast<T*>(pointer)};
}
template <typename T>
Pointer<const T> global(const void* pointer) {
  return {allocation_at(pointer), static_cast<const T*>(pointer)};
}

template <typename U, typename T>
auto as(Pointer<T> pointer) {
  using Target = std::conditional_t<std::is_const_v<T>, const U, U>;
  return Pointer<Target>(pointer.allocation(), reinterpret_cast<Target*>(pointer.address()));
}

template <typename T, int kCount>
Pointer<T> static_shared(const void* key, const char* name, const Site& site = Site::current()) {
  Allocation* const piece = static_shared_piece(key, name, kCount * static_cast<int64_t>(sizeof(T)), site);
  return {piece, reinterpret_cast<T*>(piece->data())};
}

class SharedArena {
 public:
  template <typename T>
  Pointer<T> take(int64_t count, const Site& site = Site::current()) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    Allocation* const piece = shared_piece(next_, bytes, site);
    next_ += (bytes + 15) / 16 * 16;
    return {piece, reinterpret_cast<T*>(piece->data())};
  }

 private:
  int64_t next_ = 0;
};

// ---- where this thread is ----

inline int thread() {
  return position().thread;
}
inline int lane() {
  return position().thread % 32;
}
inline int warp() {
  return position().thread / 32;
}
inline int block_threads() {
  return position().block_threads;
}
inline int64_t block_x() {
  return position().block[0];
}
inline int64_t block_y() {
  return position().block[1];
}
inline int64_t block_z() {
  return position().block[2];
}
inline int64_t grid_x() {
  return position().grid[0];
}

// ---- numbers ----

inline float to_float(float x) {
  return x;
}
inline float to_float(Half x) {
  return static_cast<float>(x.value);
}
inline float to_float(BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t{x.bits} << 16);
}
template <typename T>
T from_float(float x) {
  return static_cast<T>(x);
}

// Results below the smallest normal number are flushed to zero, as ex2.approx.ftz does.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_approx(float x) {
  return std::log2(x);
}
inline uint32_t float_bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
inline float bits_float(uint32_t x) {
  return __builtin_bit_cast(float, x);
}
inline int popcount(uint32_t x) {
  return __builtin_popcount(x);
}
inline int leading_zeros(uint32_t x) {
  return x == 0 ? 32 : __builtin_clz(x);
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
  T& operator[](int i) { return data[i]; }
  const T& operator[](int i) const { return data[i]; }
};

template <typename T>
uint32_t pack2(float low, float high) {
  const Vec<T, 2> both{{T(low), T(high)}};
  return __builtin_bit_cast(uint32_t, both);
}
template <typename T>
Vec<float, 2> unpack2(uint32_t both) {
  const auto parts = __builtin_bit_cast(Vec<T, 2>, both);
  return {{to_float(parts.data[0]), to_float(parts.data[1])}};
}

// ---- vectors ----

template <int N, typename T>
Vec<std::remove_const_t<T>, N> load_vec(Pointer<T> from, const Site& site = Site::current(),
                                        bool readonly = false) {
  static_assert(sizeof(T) * N <= 16);
  from.allocation()->read(from.address(), sizeof(T) * N, sizeof(T) * N, site, readonly);
  Vec<std::remove_const_t<T>, N> value;
  std::memcpy(static_cast<void*>(&value), from.address(), sizeof(value));
  return value;
}
template <int N, typename T>
void store_vec(Pointer<T> to, const Vec<T, N>& value, const Site& site = Site::current()) {
  static_assert(sizeof(T) * N <= 16);
  to.allocation()->write(to.address(), sizeof(value), sizeof(value), site);
  std::memcpy(static_cast<void*>(to.address()), &value, sizeof(value));
}
template <int N, typename T>
Vec<std::remove_const_t<T>, N> load_readonly(Pointer<T> from, const Site& site = Site::current()) {
  from.allocation()->require(false, "load_readonly", site);
  return load_vec<N>(from, site, true);
}
template <int N, typename T>
Vec<std::remove_const_t<T>, N> load_streaming(Pointer<T> from, const Site& site = Site::current()) {
  return load_vec<N>(from, site);
}
template <int N, typename T>
void store_streaming(Pointer<T> to, const Vec<T, N>& value, const Site& site = Site::current()) {
  store_vec<N>(to, value, site);
}

// ---- the threads of a block, a warp, a cluster ----

inline void sync_block(const Site& site = Site::current()) {
  sync_block_fiber(site);
}
inline int sync_block_count(bool predicate, const Site& site = Site::current()) {
  return sync_block_count_fiber("sync_block_count", predicate, site);
}
inline bool sync_block_any(bool predicate, const Site& site = Site::current()) {
  return sync_block_count_fiber("sync_block_any", predicate, site) > 0;
}
inline void sync_cluster(const Site& site = Site::current()) {
  sync_cluster_fiber(site);
}
inline void sync_warp(const Site& site = Site::current()) {
  exchange("sync_warp", nullptr, 0, site, true);
}

template <typename T>
T from_slot(const ExchangeSlots& slots, int lane) {
  static_assert(sizeof(T) <= kExchangeBytes && std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(static_cast<void*>(&value), slots[static_cast<size_t>(lane)].bytes, sizeof(T));
  return value;
}

// A lane that would read beyond the warp keeps its own value; of a distance or a mask the low five bits
// count.
template <typename T>
T shuffle_from(const char* what, T value, int source, const Site& site) {
  static_assert(std::is_arithmetic_v<T> || std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>,
                "what __shfl_sync takes");
  const ExchangeSlots& slots = exchange(what, &value, sizeof(T), site);
  return from_slot<T>(slots, source < 0 || source > 31 ? lane() : source);
}
template <typename T>
T shuffle(T value, int source_lane, const Site& site = Site::current()) {
  return shuffle_from("shuffle", value, source_lane & 31, site);
}
template <typename T>
T shuffle_xor(T value, int mask, const Site& site = Site::current()) {
  return shuffle_from("shuffle_xor", value, lane() ^ (mask & 31), site);
}
template <typename T>
T shuffle_up(T value, int delta, const Site& site = Site::current()) {
  return shuffle_from("shuffle_up", value, lane() - (delta & 31), site);
}
template <typename T>
T shuffle_down(T value, int delta, const Site& site = Site::current()) {
  return shuffle_from("shuffle_down", value, lane() + (delta & 31), site);
}

inline uint32_t ballot_of(const char* what, bool predicate, const Site& site) {
  const ExchangeSlots& slots = exchange(what, &predicate, sizeof(predicate), site);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t{from_slot<bool>(slots, i)} << i;
  return bits;
}
inline uint32_t ballot(bool predicate, const Site& site = Site::current()) {
  return ballot_of("ballot", predicate, site);
}
inline bool any(bool predicate, const Site& site = Site::current()) {
  return ballot_of("any", predicate, site) != 0;
}
inline bool all(bool predicate, const Site& site = Site::current()) {
  return ballot_of("all", predicate, site) == ~0u;
}
inline uint32_t match_any(uint32_t value, const Site& site = Site::current()) {
  const ExchangeSlots& slots = exchange("match_any", &value, sizeof(value), site);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t{from_slot<uint32_t>(slots, i) == value} << i;
  return bits;
}

// ---- atomics ----

template <typename T, typename Combine>
T atomic_update(Pointer<T> address, const Site& site, Combine combine) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4,
                "what atomicAdd takes, and no float: the order would show");
  address.allocation()->atomic(address.address(), sizeof(T), site);
  const T old = *address.address();
  *address.address() = combine(old);
  return old;
}
template <typename T>
T atomic_add(Pointer<T> address, std::type_identity_t<T> value, const Site& site = Site::current()) {
  return atomic_update(address, site, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomic_max(Pointer<T> address, std::type_identity_t<T> value, const Site& site = Site::current()) {
  return atomic_update(address, site, [&](T old) { return old > value ? old : value; });
}
template <typename T>
T atomic_min(Pointer<T> address, std::type_identity_t<T> value, const Site& site = Site::current()) {
  return atomic_update(address, site, [&](T old) { return old < value ? old : value; });
}
template <typename T>
T atomic_or(Pointer<T> address, std::type_identity_t<T> value, const Site& site = Site::current()) {
  return atomic_update(address, site, [&](T old) { return static_cast<T>(old | value); });
}

// ---- asynchronous copies: what is copied appears at the wait ----

template <typename T>
void copy_async(Pointer<T> to, std::type_identity_t<Pointer<const T>> from, bool valid,
                const Site& site = Site::current()) {
  copy_async_fiber(to.allocation(), reinterpret_cast<std::byte*>(to.address()), from.allocation(),
                   reinterpret_cast<const std::byte*>(from.address()), valid, site);
}
inline void copy_async_commit() {
  copy_async_commit_fiber();
}
template <int kPending>
void copy_async_wait(const Site& site = Site::current()) {
  copy_async_wait_fiber(kPending, site);
}

// ---- tensor cores ----

template <bool kTransposed, typename T>
void ldmatrix_of(const char* what, uint32_t (&out)[4], Pointer<T> row, const Site& site) {
  static_assert(sizeof(T) == 2);
  require_capability(75, what, site);
  row.allocation()->require(true, what, site);
  row.allocation()->read(row.address(), 16, 16, site);
  const ExchangeSlots& slots = exchange(what, row.address(), 16, site);
  for (size_t m = 0; m < 4; ++m) {
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
      const int major = lane() / 4, minor = 2 * (lane() % 4) + e;
      const std::byte* const from = slots[8 * m + static_cast<size_t>(kTransposed ? minor : major)].bytes;
      uint16_t element;
      std::memcpy(&element, from + 2 * (kTransposed ? major : minor), 2);
      pair |= uint32_t{element} << 16 * e;
    }
    out[m] = pair;
  }
}
template <typename T>
void ldmatrix(uint32_t (&out)[4], Pointer<T> row, const Site& site = Site::current()) {
  ldmatrix_of<false>("ldmatrix", out, row, site);
}
template <typename T>
void ldmatrix_transposed(uint32_t (&out)[4], Pointer<T> row, const Site& site = Site::current()) {
  ldmatrix_of<true>("ldmatrix_transposed", out, row, site);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const Site& site = Site::current()) {
  require_capability(80, "mma_m16n8k16", site);
  struct Fragments {
    Vec<float, 2> a[4], b[2];
  };
  const Fragments mine{{unpack2<T>(a[0]), unpack2<T>(a[1]), unpack2<T>(a[2]), unpack2<T>(a[3])},
                       {unpack2<T>(b0), unpack2<T>(b1)}};
  const ExchangeSlots& slots = exchange("mma_m16n8k16", &mine, sizeof(mine), site);
  const int g = lane() / 4, c = 2 * (lane() % 4);
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = c + i % 2;
    float sum = d[i];
    for (int pair = 0; pair < 8; ++pair) {
      // A(row, k) is with lane 4 (row % 8) + k % 8 / 2, B(k, column) with lane 4 column + k % 8 / 2.
      const auto left = from_slot<Fragments>(slots, 4 * (row % 8) + pair % 4).a[row / 8 + 2 * (pair / 4)];
      const auto right = from_slot<Fragments>(slots, 4 * column + pair % 4).b[pair / 4];
      sum += left[0] * right[0];
      sum += left[1] * right[1];
    }
    d[i] = sum;
  }
}

// ---- launching ----

template <typename... Parameters, typename... Arguments>
CudaStatus launch(const CudaContext& context, const LaunchShape& shape, const char* name,
                  void (*kernel)(Parameters...), Arguments&&... arguments) {
  return run(context, shape, name, [&] { kernel(arguments...); });
}

}  // namespace csp::simt
