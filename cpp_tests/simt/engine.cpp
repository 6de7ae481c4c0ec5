#include "engine.h"

#include <algorithm>
#include <boost/context/fiber.hpp>
#include <boost/context/pooled_fixedsize_stack.hpp>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <sstream>
#include <utility>

namespace csp::simt {
namespace {

using boost::context::fiber;

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;
constexpr size_t kMaxShared = 232448;

struct Block;

struct PendingCopy {
  Allocation* to;
  std::byte* target;
  std::array<std::byte, 16> bytes;
};

struct Thread {
  Position where;
  Block* block = nullptr;
  fiber context;
  fiber* scheduler = nullptr;
  bool done = false;
  const char* waits_at = nullptr;
  std::vector<PendingCopy> open;                // copies since the last commit
  std::deque<std::vector<PendingCopy>> groups;  // committed, oldest first
};

// Threads that wait for one another.
struct Rendezvous {
  int expected = 0;
  const char* what = nullptr;
  std::vector<Thread*> arrived;
  uint32_t epoch = 0;
};

struct Warp {
  Rendezvous rendezvous;
  ExchangeSlots slots[2];
};

struct Cluster {
  Rendezvous rendezvous;
};

struct SharedPiece {
  std::vector<std::byte> bytes;
  size_t begin;
  std::unique_ptr<Allocation> allocation;
};

struct Block {
  uint32_t index = 0;
  int64_t coordinates[3];
  Cluster* cluster = nullptr;
  Rendezvous rendezvous;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  int votes[2] = {0, 0};
  std::vector<std::byte> dynamic_shared;
  std::map<std::pair<int64_t, int64_t>, std::unique_ptr<Allocation>> dynamic_pieces;
  std::map<const void*, SharedPiece> static_pieces;
};

struct Engine {
  std::mt19937_64 random{1};
  uint32_t launches = 0;
  const char* kernel = nullptr;
  LaunchShape shape;
  Thread* running = nullptr;
  std::vector<Thread*> ready;
  std::exception_ptr failure;
  // How far each thread has carved the dynamic shared memory.
  std::map<const Thread*, int64_t> carved;
};

Engine engine;
std::map<const std::byte*, Allocation*> memory;

std::string words_of(const Thread& thread) {
  std::ostringstream out;
  out << "block (" << thread.where.block[0] << ", " << thread.where.block[1] << ", " << thread.where.block[2]
      << ") thread " << thread.where.thread;
  return out.str();
}

Warp& warp_of(const Thread& thread) {
  return *thread.block->warps[static_cast<size_t>(thread.where.thread / kWarp)];
}

Stamp stamp(bool atomic) {
  const Thread& thread = *engine.running;
  const Block& block = *thread.block;
  return {engine.launches,
          block.index,
          block.cluster->rendezvous.epoch,
          block.rendezvous.epoch,
          warp_of(thread).rendezvous.epoch,
          thread.where.thread,
          atomic};
}

bool ordered(const Stamp& before, const Stamp& now, bool same_cluster) {
  if (before.launch != now.launch || before.thread < 0) return true;
  if (before.atomic && now.atomic) return true;
  if (same_cluster && before.cluster_epoch != now.cluster_epoch) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.block_epoch != now.block_epoch) return true;
  return before.thread / kWarp == now.thread / kWarp && before.warp_epoch != now.warp_epoch;
}

bool ordered(const Stamp& before, const Stamp& now) {
  const auto cluster = static_cast<uint32_t>(engine.shape.cluster);
  return ordered(before, now, before.block / cluster == now.block / cluster);
}

void yield() {
  fiber& scheduler = *engine.running->scheduler;
  scheduler = std::move(scheduler).resume();
}

// Waits until `expected` threads have come, all of them by the same call.
void meet(Rendezvous& at, const char* what) {
  Thread& me = *engine.running;
  if (!at.arrived.empty() && std::strcmp(at.what, what) != 0) {
    violation(std::string("calls ") + what + " while " + words_of(*at.arrived[0]) + " waits at " + at.what);
  }
  at.what = what;
  at.arrived.push_back(&me);
  me.waits_at = what;
  if (static_cast<int>(at.arrived.size()) == at.expected) {
    ++at.epoch;
    for (Thread* thread : at.arrived) {
      thread->waits_at = nullptr;
      engine.ready.push_back(thread);
    }
    at.arrived.clear();
  }
  yield();
}

void refuse_if_stuck(const std::vector<std::unique_ptr<Block>>& blocks) {
  for (const auto& block : blocks) {
    for (const auto& thread : block->threads) {
      if (thread->done) continue;
      std::string others;
      for (const auto& other : block->threads) {
        if (other->done) {
          others = "thread " + std::to_string(other->where.thread) + " has returned";
          break;
        }
        if (std::strcmp(other->waits_at, thread->waits_at) != 0) {
          others = "thread " + std::to_string(other->where.thread) + " waits at " + other->waits_at;
          break;
        }
      }
      throw Violation(std::string(engine.kernel) + ": " + words_of(*thread) + " waits at " +
                      thread->waits_at + " for ever" + (others.empty() ? "" : ": " + others));
    }
  }
}

void noise(std::byte* data, size_t bytes) {
  std::mt19937 random(static_cast<uint32_t>(bytes) ^ 0x5eedu);
  for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<std::byte>(random() | 0x80u);
}

void run_blocks(std::vector<std::unique_ptr<Block>>& blocks, const std::function<void()>& kernel) {
  engine.ready.clear();
  engine.carved.clear();
  static boost::context::pooled_fixedsize_stack stacks(kStackBytes);
  for (auto& block : blocks) {
    for (auto& thread : block->threads) {
      Thread* const me = thread.get();
      thread->context = fiber(std::allocator_arg, stacks, [me, &kernel](fiber&& scheduler) {
        me->scheduler = &scheduler;
        try {
          kernel();
          if (!me->open.empty() || !me->groups.empty())
            violation("returns without waiting for its copy_async");
        } catch (const boost::context::detail::forced_unwind&) {
          throw;
        } catch (...) {
          engine.failure = std::current_exception();
        }
        me->done = true;
        return std::move(scheduler);
      });
      engine.ready.push_back(me);
    }
  }
  while (!engine.ready.empty()) {
    const size_t pick = engine.random() % engine.ready.size();
    std::swap(engine.ready[pick], engine.ready.back());
    Thread* const thread = engine.ready.back();
    engine.ready.pop_back();
    engine.running = thread;
    thread->context = std::move(thread->context).resume();
    engine.running = nullptr;
    if (engine.failure) std::rethrow_exception(std::exchange(engine.failure, nullptr));
  }
  refuse_if_stuck(blocks);
}

std::unique_ptr<Block> make_block(const LaunchShape& shape, int64_t x, int64_t y, int64_t z,
                                  Cluster* cluster) {
  auto block = std::make_unique<Block>();
  block->index = static_cast<uint32_t>((z * shape.y + y) * shape.x + x);
  block->coordinates[0] = x, block->coordinates[1] = y, block->coordinates[2] = z;
  block->cluster = cluster;
  block->rendezvous.expected = shape.threads;
  block->dynamic_shared.resize(static_cast<size_t>(shape.shared_bytes) + 16);
  noise(block->dynamic_shared.data(), block->dynamic_shared.size());
  for (int w = 0; w < shape.threads / kWarp; ++w) {
    block->warps.push_back(std::make_unique<Warp>());
    block->warps.back()->rendezvous.expected = kWarp;
  }
  for (int t = 0; t < shape.threads; ++t) {
    block->threads.push_back(std::make_unique<Thread>());
    Thread& thread = *block->threads.back();
    thread.block = block.get();
    thread.where = {t, shape.threads, {x, y, z}, {shape.x, shape.y, shape.z}};
  }
  return block;
}

std::byte* align16(std::byte* p) {
  return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16;
}

}  // namespace

// ---- memory ----

Allocation::Allocation(std::string name, std::byte* data, size_t bytes, bool shared)
    : name_(std::move(name)), data_(data), bytes_(bytes), shared_(shared), shadow_(bytes) {}

void Allocation::mark_written(size_t begin, size_t size) {
  for (size_t i = begin; i < begin + size; ++i) shadow_[i].written = true;
}

size_t Allocation::offset_of(const char* what, const void* p, size_t size, size_t alignment) const {
  const auto offset = static_cast<const std::byte*>(p) - data_;
  if (offset < 0 || static_cast<size_t>(offset) + size > bytes_) {
    violation(std::string(what) + " " + std::to_string(size) + " bytes at offset " + std::to_string(offset) +
              " of " + name_ + ", which has " + std::to_string(bytes_));
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    violation(std::string(what) + " " + name_ + " at offset " + std::to_string(offset) + ", not aligned to " +
              std::to_string(alignment) + " bytes");
  }
  return static_cast<size_t>(offset);
}

namespace {

[[noreturn]] void race(const char* mine, const char* theirs, const std::string& name, size_t offset,
                       const Stamp& other) {
  violation(std::string(mine) + " " + name + " at byte " + std::to_string(offset) + ", which thread " +
            std::to_string(other.thread) +
            (other.block == engine.running->block->index ? "" : " of another block") + " " + theirs +
            " without a barrier between them");
}

}  // namespace

void Allocation::read(const void* from, size_t size, size_t alignment) {
  const size_t offset = offset_of("reads", from, size, alignment);
  const Stamp now = stamp(false);
  for (size_t i = offset; i < offset + size; ++i) {
    Shadow& byte = shadow_[i];
    if (!byte.written) {
      violation("reads " + name_ + " at byte " + std::to_string(i) + ", which nobody has written");
    }
    if (!ordered(byte.write, now)) race("reads", "wrote", name_, i, byte.write);
    const bool first = byte.reads[0].thread == now.thread && byte.reads[0].block == now.block;
    byte.reads[first || ordered(byte.reads[0], now) ? 0 : 1] = now;
  }
}

void Allocation::write(const void* to, size_t size, size_t alignment) {
  const size_t offset = offset_of("writes", to, size, alignment);
  const Stamp now = stamp(false);
  for (size_t i = offset; i < offset + size; ++i) {
    Shadow& byte = shadow_[i];
    if (!ordered(byte.write, now)) race("writes", "wrote", name_, i, byte.write);
    for (const Stamp& read : byte.reads) {
      if (!ordered(read, now)) race("writes", "read", name_, i, read);
    }
    byte.write = now;
    byte.written = true;
  }
}

void Allocation::atomic(const void* to, size_t size) {
  const size_t offset = offset_of("atomically updates", to, size, size);
  const Stamp now = stamp(true);
  for (size_t i = offset; i < offset + size; ++i) {
    Shadow& byte = shadow_[i];
    if (!byte.written) {
      violation("atomically updates " + name_ + " at byte " + std::to_string(i) +
                ", which nobody has written");
    }
    if (!ordered(byte.write, now)) race("atomically updates", "wrote", name_, i, byte.write);
    for (const Stamp& read : byte.reads) {
      if (!ordered(read, now)) race("atomically updates", "read", name_, i, read);
    }
    byte.write = now;
  }
}

DeviceMemory::DeviceMemory(std::string name, const void* contents, size_t bytes)
    : data_(static_cast<std::byte*>(
          std::aligned_alloc(kAlignment, bytes / kAlignment * kAlignment + kAlignment))),
      bytes_(bytes),
      allocation_(std::make_unique<Allocation>(std::move(name), data_, bytes, false)) {
  noise(data_, bytes);
  if (contents != nullptr) {
    std::memcpy(data_, contents, bytes);
    allocation_->mark_written(0, bytes);
  }
  memory[data_] = allocation_.get();
}

DeviceMemory::~DeviceMemory() {
  memory.erase(data_);
  std::free(data_);
}

Allocation* allocation_at(const void* p) {
  static Allocation nothing("memory that is not the device's", nullptr, 0, false);
  auto after = memory.upper_bound(static_cast<const std::byte*>(p));
  if (after == memory.begin()) return &nothing;
  Allocation* const candidate = std::prev(after)->second;
  // One past the end still belongs to it: kernels form such pointers without using them.
  return p <= candidate->data() + candidate->bytes() ? candidate : &nothing;
}

// ---- the running thread ----

const Position& position() {
  return engine.running->where;
}

void violation(const std::string& what) {
  const std::string who = engine.running == nullptr ? "the host" : words_of(*engine.running);
  throw Violation(std::string(engine.kernel == nullptr ? "" : engine.kernel) + ": " + who + " " + what);
}

void sync_block_fiber(const char* what) {
  meet(engine.running->block->rendezvous, what);
}

void sync_cluster_fiber() {
  meet(engine.running->block->cluster->rendezvous, "sync_cluster");
}

const ExchangeSlots& exchange(const char* what, const void* mine, size_t size) {
  Warp& warp = warp_of(*engine.running);
  // Two sets of slots: a fast lane may be one collective ahead of a slow one, never two.
  ExchangeSlots& slots = warp.slots[warp.rendezvous.epoch % 2];
  std::memcpy(slots[static_cast<size_t>(engine.running->where.thread % kWarp)].data(), mine, size);
  meet(warp.rendezvous, what);
  return slots;
}

int sync_block_count_fiber(bool predicate) {
  Block& block = *engine.running->block;
  int& votes = block.votes[block.rendezvous.epoch % 2];
  if (block.rendezvous.arrived.empty()) votes = 0;
  votes += predicate;
  meet(block.rendezvous, "sync_block_count");
  return votes;
}

Allocation* shared_piece(int64_t bytes, std::byte** data) {
  Block& block = *engine.running->block;
  int64_t& carved = engine.carved[engine.running];
  const int64_t begin = carved;
  carved += (bytes + 15) / 16 * 16;
  if (begin + bytes > engine.shape.shared_bytes) {
    violation("takes " + std::to_string(begin + bytes) + " bytes of dynamic shared memory, of " +
              std::to_string(engine.shape.shared_bytes));
  }
  *data = align16(block.dynamic_shared.data()) + begin;
  auto& piece = block.dynamic_pieces[{begin, bytes}];
  if (!piece) {
    piece = std::make_unique<Allocation>(
        "shared memory [" + std::to_string(begin) + ", " + std::to_string(begin + bytes) + ")", *data,
        static_cast<size_t>(bytes), true);
  }
  return piece.get();
}

Allocation* static_shared_piece(const void* key, int64_t bytes, std::byte** data) {
  SharedPiece& piece = engine.running->block->static_pieces[key];
  if (!piece.allocation) {
    piece.bytes.resize(static_cast<size_t>(bytes) + 16);
    noise(piece.bytes.data(), piece.bytes.size());
    piece.allocation = std::make_unique<Allocation>("static shared memory", align16(piece.bytes.data()),
                                                    static_cast<size_t>(bytes), true);
  }
  *data = piece.allocation->data();
  return piece.allocation.get();
}

void copy_async_fiber(Allocation* to, std::byte* target, Allocation* from, const std::byte* source,
                      bool valid) {
  PendingCopy copy{to, target, {}};
  if (valid) {
    from->read(source, 16, 16);
    std::memcpy(copy.bytes.data(), source, 16);
  }
  engine.running->open.push_back(copy);
}

void copy_async_commit_fiber() {
  engine.running->groups.push_back(std::exchange(engine.running->open, {}));
}

void copy_async_wait_fiber(int pending) {
  auto& groups = engine.running->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const PendingCopy& copy : groups.front()) {
      copy.to->write(copy.target, 16, 16);
      std::memcpy(copy.target, copy.bytes.data(), 16);
    }
    groups.pop_front();
  }
}

// ---- running ----

void seed(uint64_t value) {
  engine.random.seed(value);
}

uint32_t launches() {
  return engine.launches;
}

CudaStatus run(const CudaContext& context, const LaunchShape& shape, const char* name,
               const std::function<void()>& kernel) {
  constexpr int64_t kMaxX = (1ll << 31) - 1, kMaxYZ = 65535;
  if (shape.x < 1 || shape.y < 1 || shape.z < 1 || shape.x > kMaxX || shape.y > kMaxYZ || shape.z > kMaxYZ ||
      shape.threads < 1 || shape.threads > 1024 || shape.cluster < 1 || shape.cluster > 8 ||
      shape.x % shape.cluster != 0 || shape.shared_bytes > context.device.shared_bytes ||
      (shape.cluster > 1 && context.device.capability < 90)) {
    return {kCudaInvalidValue, name};
  }
  if (shape.threads % kWarp != 0) {
    throw Violation(std::string(name) + ": " + std::to_string(shape.threads) +
                    " threads are not whole warps");
  }
  engine.kernel = name;
  engine.shape = shape;
  ++engine.launches;
  std::vector<std::array<int64_t, 3>> clusters;
  for (int64_t z = 0; z < shape.z; ++z) {
    for (int64_t y = 0; y < shape.y; ++y) {
      for (int64_t x = 0; x < shape.x; x += shape.cluster) clusters.push_back({x, y, z});
    }
  }
  std::shuffle(clusters.begin(), clusters.end(), engine.random);
  for (const auto& [x, y, z] : clusters) {
    Cluster cluster;
    cluster.rendezvous.expected = shape.cluster * shape.threads;
    std::vector<std::unique_ptr<Block>> blocks;
    for (int64_t member = 0; member < shape.cluster; ++member) {
      blocks.push_back(make_block(shape, x + member, y, z, &cluster));
    }
    run_blocks(blocks, kernel);
  }
  engine.kernel = nullptr;
  return {};
}

}  // namespace csp::simt
