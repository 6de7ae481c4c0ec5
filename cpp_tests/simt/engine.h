#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

// Runs a kernel on the CPU, each thread of a block as a fiber, in a seeded random order, and refuses what a
// GPU would let pass: an access outside an allocation, a read of memory that nobody wrote, two threads that
// meet in one place without a barrier between them, a barrier or a warp collective that not all threads
// reach.
namespace csp::simt {

// What a kernel did wrong, with the kernel, the block and the thread.
class Violation : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Who touched a byte, and when: two accesses of one launch are ordered by the thread itself, by the barriers
// of its block and its cluster, or by the collectives of its warp; nothing else orders them.
struct Stamp {
  uint32_t launch = 0;
  uint32_t block = 0;
  uint32_t cluster_epoch = 0;
  uint32_t block_epoch = 0;
  uint32_t warp_epoch = 0;
  int32_t thread = -1;
  bool atomic = false;
};

struct Shadow {
  Stamp write;
  Stamp reads[2];  // the latest reads of two different threads
  bool written = false;
};

// Memory that kernels may touch: a range of bytes with a shadow each.
class Allocation {
 public:
  Allocation(std::string name, std::byte* data, size_t bytes, bool shared);

  const std::string& name() const { return name_; }
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* p) const { return p >= data_ && p < data_ + bytes_; }
  void mark_written(size_t begin, size_t size);

  // Checks an access of the running thread and takes note of it.
  void read(const void* from, size_t size, size_t alignment);
  void write(const void* to, size_t size, size_t alignment);
  void atomic(const void* to, size_t size);

 private:
  size_t offset_of(const char* what, const void* p, size_t size, size_t alignment) const;

  std::string name_;
  std::byte* data_;
  size_t bytes_;
  bool shared_;
  std::vector<Shadow> shadow_;
};

// Global memory of the harness; a kernel may touch nothing else.
class DeviceMemory {
 public:
  // With `contents` null the memory holds noise, and reading it before it was written is a violation.
  DeviceMemory(std::string name, const void* contents, size_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // `offset` bytes past a 256-byte boundary lie the contents: for misaligned problems.
  static constexpr size_t kAlignment = 256;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_;
  size_t bytes_;
  std::unique_ptr<Allocation> allocation_;
};

// The allocation that holds `p`: where none does, one that refuses every access.
Allocation* allocation_at(const void* p);

// ---- what the primitives ask of the running thread ----

struct Position {
  int thread;
  int block_threads;
  int64_t block[3];
  int64_t grid[3];
};

const Position& position();
[[noreturn]] void violation(const std::string& what);

void sync_block_fiber(const char* what);
void sync_cluster_fiber();

// All 32 lanes hand in `size` bytes and get everybody's. `what` must be the same call in every lane.
constexpr size_t kExchangeBytes = 64;
using ExchangeSlots = std::array<std::array<std::byte, kExchangeBytes>, 32>;
const ExchangeSlots& exchange(const char* what, const void* mine, size_t size);

// A count over the block with a barrier on both sides.
int sync_block_count_fiber(bool predicate);

Allocation* shared_piece(int64_t bytes, std::byte** data);  // of the dynamic shared memory
Allocation* static_shared_piece(const void* key, int64_t bytes, std::byte** data);  // by declaration

void copy_async_fiber(Allocation* to, std::byte* target, Allocation* from, const std::byte* source,
                      bool valid);
void copy_async_commit_fiber();
void copy_async_wait_fiber(int pending);

// ---- running ----

// Seeds the order of threads and blocks from here on.
void seed(uint64_t value);

// Launches so far, for tests that count them.
uint32_t launches();

CudaStatus run(const CudaContext& context, const LaunchShape& shape, const char* name,
               const std::function<void()>& kernel);

}  // namespace csp::simt
