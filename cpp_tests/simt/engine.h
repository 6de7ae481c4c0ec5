#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "shadow.h"

// Runs a kernel on the CPU, each thread of a block as a fiber, in a seeded random order, and refuses what a
// GPU would let pass: an access outside an allocation, a read of memory that nobody wrote, two threads that
// meet in one place without a barrier between them, a barrier or a warp collective that not all threads
// reach. docs/simt-harness.md says what it sees and what it cannot.
namespace csp::simt {

// What a kernel did wrong: the kernel, the block, the thread, the line and the memory.
class Violation : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] void violation(const std::string& what, const Site& site = {});

// ---- memory ----

// A range of bytes that kernels may touch.
class Allocation {
 public:
  // Its history is that of `shadow` from byte `begin` on.
  Allocation(std::string name, std::byte* data, size_t bytes, bool shared, Shadow* shadow, size_t begin);

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void require(bool shared, const char* what, const Site& site) const;

  // Each checks an access of the running thread and takes note of it.
  void read(const void* from, size_t size, size_t alignment, const Site& site, bool readonly = false);
  void write(const void* to, size_t size, size_t alignment, const Site& site);
  void atomic(const void* to, size_t size, const Site& site);
  // 16 bytes that are written at some time between the two.
  void begin_copy(const void* to, const Site& site);
  void end_copy(const void* to, const Site& site);

 private:
  size_t offset_of(const char* what, const void* p, size_t size, size_t alignment, const Site& site) const;
  void overwrite(const char* what, const void* to, size_t size, size_t alignment, Stamp now,
                 const Site& site);
  void refuse_copy_under_way(const char* what, Stamp write, size_t offset, const Site& site) const;
  [[noreturn]] void race(const char* mine, const char* theirs, size_t offset, Stamp other, Crowd crowd,
                         const Site& site) const;

  std::string name_;
  std::byte* data_;
  size_t bytes_;
  bool shared_;
  Shadow* shadow_;
  size_t begin_;
};

// Global memory of the harness; a kernel may touch nothing else.
class DeviceMemory {
 public:
  static constexpr size_t kAlignment = 256;

  // Begins `offset` bytes past a 256-byte boundary. With `contents` null it holds noise, and reading it
  // before it was written is a violation.
  DeviceMemory(std::string name, const void* contents, size_t bytes, size_t offset = 0);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() const { return allocation_.data(); }
  size_t bytes() const { return allocation_.bytes(); }

 private:
  std::byte* base_;
  Shadow shadow_;
  Allocation allocation_;
};

// The allocation that holds `p`: where none does, one that refuses every access.
Allocation* allocation_at(const void* p);

// ---- what the primitives ask of the running thread ----

struct Position {
  int thread = 0;
  int block_threads = 0;
  int64_t block[3] = {};
  int64_t grid[3] = {};
};

inline const Position* running_at = nullptr;
inline const Position& position() {
  return *running_at;
}

// The device must be of this capability to have `what`.
void require_capability(int capability, const char* what, const Site& site);

void sync_block_fiber(const Site& site);
void sync_cluster_fiber(const Site& site);

// A count over the block, with a barrier.
int sync_block_count_fiber(const char* what, bool predicate, const Site& site);

// All 32 lanes hand in `size` bytes and get everybody's. It orders accesses to memory only as a `barrier`.
constexpr size_t kExchangeBytes = 64;
struct alignas(16) ExchangeSlot {
  std::byte bytes[kExchangeBytes];
};
using ExchangeSlots = std::array<ExchangeSlot, 32>;
const ExchangeSlots& exchange(const char* what, const void* mine, size_t size, const Site& site,
                              bool barrier = false);

// Bytes [begin, begin + bytes) of the block's dynamic shared memory; static shared memory by its declaration.
Allocation* shared_piece(int64_t begin, int64_t bytes, const Site& site);
Allocation* static_shared_piece(const void* key, const char* name, int64_t bytes, const Site& site);

void copy_async_fiber(Allocation* to, std::byte* target, Allocation* from, const std::byte* source,
                      bool valid, const Site& site);
void copy_async_commit_fiber();
void copy_async_wait_fiber(int pending, const Site& site);

// ---- running ----

// Seeds the order of threads and blocks, and the noise, from here on. CSP_SIMT_SEED=n shifts all seeds.
void seed(uint64_t value);

// Launches so far, for tests that count them.
uint32_t launches();

// For tests of the harness itself: without it, races and reads of what nobody wrote pass.
void check_accesses(bool on);

CudaStatus run(const CudaContext& context, const LaunchShape& shape, const char* name,
               const std::function<void()>& kernel);

}  // namespace csp::simt
