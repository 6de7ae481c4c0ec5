#include "engine.h"

#include <algorithm>
#include <boost/context/fiber.hpp>
#include <boost/context/stack_context.hpp>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <new>
#include <sstream>
#include <utility>
#include <vector>

#include <sys/mman.h>

namespace csp::simt {
namespace {

using boost::context::fiber;

constexpr int kWarp = 32;
constexpr int64_t kMaxStaticShared = 48 << 10;

// splitmix64: the same numbers everywhere.
struct Random {
  using result_type = uint64_t;
  uint64_t state;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return static_cast<size_t>(static_cast<unsigned __int128>((*this)()) * n >> 64); }
};

// Fiber stacks are kept for the next block. Below each lies a page that nothing may touch, so that a stack
// that overflows stops the program.
class Stacks {
 public:
  boost::context::stack_context allocate() {
    if (free_.empty()) add();
    const boost::context::stack_context stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void deallocate(boost::context::stack_context& stack) { free_.push_back(stack); }

 private:
  static constexpr size_t kBytes = 256 << 10, kPage = 4096;

  void add() {
    void* const base = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    mprotect(base, kPage, PROT_NONE);
    // Not all at the same distance from a page: their tops would share a few sets of the cache.
    const size_t shift = made_++ * 5 % 64 * 64;
    boost::context::stack_context stack;
    stack.size = kBytes - kPage - shift;
    stack.sp = static_cast<std::byte*>(base) + kBytes - shift;
    free_.push_back(stack);
  }

  std::vector<boost::context::stack_context> free_;
  size_t made_ = 0;
};

Stacks& stacks() {
  static Stacks all;
  return all;
}

struct StackAllocator {
  boost::context::stack_context allocate() { return stacks().allocate(); }
  void deallocate(boost::context::stack_context& stack) { stacks().deallocate(stack); }
};

struct Block;

struct PendingCopy {
  int64_t group;
  Allocation *to, *from;
  std::byte* target;
  const std::byte* source;  // null: zeros
  std::array<std::byte, 16> bytes;
};

struct Thread {
  Position where;
  Block* block = nullptr;
  fiber context;
  fiber* scheduler = nullptr;
  bool done = false;
  const char* waits_at = nullptr;
  Site waits_on;
  int64_t group = 0;  // of the copies to come
  std::vector<PendingCopy> copies;
};

// Threads that wait for one another.
struct Group {
  int expected = 0;
  std::vector<Thread*> arrived;
  const Thread* returned = nullptr;
  uint64_t meetings = 0;
  uint64_t barrier = 0;  // the time of the last one

  void begin(int threads) {
    expected = threads;
    arrived.clear();
    returned = nullptr;
    barrier = 0;
  }
};

struct Warp : Group {
  ExchangeSlots slots[2];
  const Thread* first = nullptr;  // of those that wait at a call that all lanes must make
  int waiting = 0;
};

struct SharedMemory {
  explicit SharedMemory(size_t bytes)
      : data(static_cast<std::byte*>(std::aligned_alloc(16, (bytes + 31) / 16 * 16))),
        size(bytes),
        shadow(bytes, false) {}
  void begin(Random& random);

  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data;
  size_t size;
  Shadow shadow;
};

struct StaticPiece {
  StaticPiece(const char* name, size_t bytes)
      : memory(bytes),
        allocation(std::string("static shared memory ") + name, memory.data.get(), bytes, true,
                   &memory.shadow, 0) {}

  SharedMemory memory;
  Allocation allocation;
};

struct Block : Group {
  uint64_t in_cluster = 0;
  Group* cluster = nullptr;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  int votes[2] = {0, 0};
  std::unique_ptr<SharedMemory> dynamic;
  std::map<std::pair<int64_t, int64_t>, Allocation> dynamic_pieces;
  std::map<const void*, std::unique_ptr<StaticPiece>> static_pieces;
  int64_t static_bytes = 0;
};

uint64_t seed_shift() {
  static const char* const text = std::getenv("CSP_SIMT_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

struct Engine {
  uint64_t seed = 1 + seed_shift();
  Random random{seed};
  uint32_t launches = 0;
  uint64_t time = 2;  // 0: nobody wrote; 1: written before any kernel
  bool checks = true;
  std::string kernel;
  LaunchShape shape;
  CudaDevice device;
  Thread* running = nullptr;
  std::vector<Thread*> ready;
  std::exception_ptr failure;
  std::vector<std::pair<uint64_t, std::array<int64_t, 3>>> clusters;  // of this launch, with their times
};

Engine engine;
std::map<const std::byte*, Allocation*> memory;

uint64_t tick() {
  if (++engine.time >> (64 - Stamp::kTimeAt) != 0)
    throw std::overflow_error("the harness ran out of time stamps");
  return engine.time;
}

std::string words_of(int64_t x, int64_t y, int64_t z) {
  std::ostringstream out;
  out << "block (" << x << ", " << y << ", " << z << ")";
  return out.str();
}

std::string words_of(const Thread& thread) {
  const int64_t (&block)[3] = thread.where.block;
  return words_of(block[0], block[1], block[2]) + " thread " + std::to_string(thread.where.thread);
}

std::string words_of(const Site& site) {
  if (site.line() == 0) return "";
  const char* const slash = std::strrchr(site.file_name(), '/');
  return " at " + std::string(slash == nullptr ? site.file_name() : slash + 1) + ":" +
         std::to_string(site.line());
}

std::string waiting(const Thread& thread) {
  return words_of(thread) + " waits at " + thread.waits_at + words_of(thread.waits_on);
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

[[noreturn]] void refuse(const std::string& what) {
  throw Violation((engine.kernel.empty() ? "no kernel" : engine.kernel) + ": " + what + " [seed " +
                  std::to_string(engine.seed) + "]");
}

Warp& warp_of(const Thread& thread) {
  return thread.block->warps[static_cast<size_t>(thread.where.thread / kWarp)];
}

void yield() {
  fiber& scheduler = *engine.running->scheduler;
  scheduler = std::move(scheduler).resume();
}

// Waits until the whole group has come, every thread by the same call.
void meet(Group& group, const char* what, const Site& site, bool barrier) {
  Thread& me = *engine.running;
  Warp& warp = warp_of(me);
  if (warp.waiting > 0 &&
      (std::strcmp(warp.first->waits_at, what) != 0 || !same(warp.first->waits_on, site))) {
    violation(std::string("calls ") + what + " while " + waiting(*warp.first) + ", in the same warp", site);
  }
  if (!group.arrived.empty() && std::strcmp(group.arrived[0]->waits_at, what) != 0) {
    violation(std::string("calls ") + what + " while " + waiting(*group.arrived[0]), site);
  }
  if (group.returned != nullptr) {
    violation(std::string("calls ") + what + ", but " + words_of(*group.returned) + " has returned", site);
  }
  me.waits_at = what;
  me.waits_on = site;
  if (warp.waiting == 0) warp.first = &me;
  warp.waiting = (warp.waiting + 1) % kWarp;
  group.arrived.push_back(&me);
  if (static_cast<int>(group.arrived.size()) == group.expected) {
    ++group.meetings;
    if (barrier) group.barrier = tick();
    engine.ready.insert(engine.ready.end(), group.arrived.begin(), group.arrived.end());
    group.arrived.clear();
  }
  yield();
}

// The kernel has returned in the running thread.
void leave() {
  Thread& me = *engine.running;
  if (!me.copies.empty()) violation("returns without waiting for its copy_async");
  for (Group* group : {static_cast<Group*>(&warp_of(me)), static_cast<Group*>(me.block), me.block->cluster}) {
    if (!group->arrived.empty()) violation("returns while " + waiting(*group->arrived[0]));
    group->returned = &me;
  }
}

void refuse_if_stuck(const std::vector<Block>& blocks) {
  const Thread* first = nullptr;
  for (const Block& block : blocks) {
    for (const Thread& thread : block.threads) {
      if (thread.done) continue;
      if (first == nullptr) first = &thread;
      if (std::strcmp(first->waits_at, thread.waits_at) == 0) continue;
      refuse(waiting(*first) + " for ever, while " + waiting(thread));
    }
  }
  if (first != nullptr) refuse(waiting(*first) + " for ever");
}

void noise(std::byte* data, size_t bytes, Random& random) {
  for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
    const uint64_t word = random();
    std::memcpy(data + i, &word, std::min(sizeof(word), bytes - i));
  }
}

void SharedMemory::begin(Random& random) {
  shadow.forget(engine.time);
  noise(data.get(), size, random);
}

void resume(Thread& thread) {
  const Block& block = *thread.block;
  engine.running = &thread;
  running_at = &thread.where;
  present.who = block.in_cluster << Stamp::kThreadBits | static_cast<uint64_t>(thread.where.thread);
  present.time = engine.time;
  present.warp = warp_of(thread).barrier;
  present.block = block.barrier;
  present.cluster = block.cluster->barrier;
  thread.context = std::move(thread.context).resume();
  engine.running = nullptr;
  running_at = nullptr;
}

void run_blocks(std::vector<Block>& blocks, const std::function<void()>& kernel) {
  engine.ready.clear();
  for (Block& block : blocks) {
    for (Thread& thread : block.threads) {
      Thread* const me = &thread;
      thread.done = false;
      thread.group = 0;
      thread.context = fiber(std::allocator_arg, StackAllocator(), [me, &kernel](fiber&& scheduler) {
        me->scheduler = &scheduler;
        try {
          kernel();
          leave();
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
    std::swap(engine.ready[engine.random.below(engine.ready.size())], engine.ready.back());
    Thread* const thread = engine.ready.back();
    engine.ready.pop_back();
    resume(*thread);
    if (engine.failure) std::rethrow_exception(std::exchange(engine.failure, nullptr));
  }
  refuse_if_stuck(blocks);
}

// The blocks of a cluster; each cluster of a launch runs in the same ones.
std::vector<Block> make_blocks(const LaunchShape& shape, Group* cluster) {
  std::vector<Block> blocks(static_cast<size_t>(shape.cluster));
  for (Block& block : blocks) {
    block.in_cluster = static_cast<uint64_t>(&block - blocks.data());
    block.cluster = cluster;
    block.warps = std::vector<Warp>(static_cast<size_t>(shape.threads / kWarp));
    block.threads = std::vector<Thread>(static_cast<size_t>(shape.threads));
    block.dynamic = std::make_unique<SharedMemory>(static_cast<size_t>(shape.shared_bytes));
    for (Thread& thread : block.threads) {
      thread.block = &block;
      thread.where = {
          static_cast<int>(&thread - block.threads.data()), shape.threads, {}, {shape.x, shape.y, shape.z}};
    }
  }
  return blocks;
}

void begin(Block& block, int64_t x, int64_t y, int64_t z) {
  block.Group::begin(engine.shape.threads);
  for (Warp& warp : block.warps) {
    warp.begin(kWarp);
    warp.waiting = 0;
  }
  for (Thread& thread : block.threads) {
    int64_t (&at)[3] = thread.where.block;
    at[0] = x, at[1] = y, at[2] = z;
  }
  block.dynamic->begin(engine.random);
  for (auto& [key, piece] : block.static_pieces) piece->memory.begin(engine.random);
}

}  // namespace

// ---- sites ----

namespace {

std::vector<Site> sites(1);

}  // namespace

uint64_t number_of(const Site& site) {
  // By the address of the file's name and the line, in an open table.
  struct Entry {
    const char* file = nullptr;
    uint_least32_t line = 0;
    uint32_t number = 0;
  };
  constexpr size_t kMost = size_t{1} << Stamp::kSiteBits;
  static std::array<Entry, 2 * kMost> table;
  if (site.line() == 0) return 0;
  const auto hash = (reinterpret_cast<uintptr_t>(site.file_name()) + site.line()) * 0x9e3779b97f4a7c15u;
  for (size_t i = hash >> 40;; ++i) {
    Entry& entry = table[i % table.size()];
    if (entry.file == site.file_name() && entry.line == site.line()) return entry.number;
    if (entry.file != nullptr) continue;
    if (sites.size() == kMost) return 0;
    entry = {site.file_name(), site.line(), static_cast<uint32_t>(sites.size())};
    sites.push_back(site);
    return entry.number;
  }
}

// ---- memory ----

Allocation::Allocation(std::string name, std::byte* data, size_t bytes, bool shared, Shadow* shadow,
                       size_t begin)
    : name_(std::move(name)), data_(data), bytes_(bytes), shared_(shared), shadow_(shadow), begin_(begin) {}

void Allocation::require(bool shared, const char* what, const Site& site) const {
  if (shared != shared_) {
    violation(std::string("calls ") + what + " on " + name_ + ", not on " + (shared ? "shared" : "global") +
                  " memory",
              site);
  }
}

size_t Allocation::offset_of(const char* what, const void* p, size_t size, size_t alignment,
                             const Site& site) const {
  if (shadow_ == nullptr) {
    violation(std::string(what) + " " + std::to_string(size) + " bytes of " + name_, site);
  }
  const auto offset = static_cast<const std::byte*>(p) - data_;
  if (offset < 0 || static_cast<size_t>(offset) + size > bytes_) {
    violation(std::string(what) + " " + std::to_string(size) + " bytes at byte " + std::to_string(offset) +
                  " of " + name_ + ", which has " + std::to_string(bytes_) + " bytes",
              site);
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    violation(std::string(what) + " " + std::to_string(size) + " bytes at byte " + std::to_string(offset) +
                  " of " + name_ + ", not aligned to " + std::to_string(alignment) + " bytes",
              site);
  }
  return static_cast<size_t>(offset);
}

namespace {

// A read that the running thread's access is not ordered after.
Stamp other_reader(const Granule& granule, uint64_t forgotten) {
  const Stamp before = granule.read_before;
  return present.made(granule.read) && present.with(before, forgotten) ? before : granule.read;
}

}  // namespace

void Allocation::race(const char* mine, const char* theirs, size_t offset, Stamp other, Crowd crowd,
                      const Site& site) const {
  std::string who;
  const bool me = present.made(other);  // it was not alone
  if (me) {
    who = crowd == kInWarp    ? "another thread of the warp"
          : crowd == kInBlock ? "another thread of the block"
                              : "another block";
  } else {
    const auto after =
        std::upper_bound(engine.clusters.begin(), engine.clusters.end(), other.time(),
                         [](uint64_t time, const auto& cluster) { return time < cluster.first; });
    const auto& [x, y, z] = std::prev(after)->second;
    const auto block = static_cast<int64_t>(other.who() >> Stamp::kThreadBits);
    who = (crowd >= kInCluster ? words_of(x + block, y, z) + " " : "") + "thread " +
          std::to_string(other.thread());
  }
  const char* const lacking = crowd == kInWarp      ? " without sync_warp between them"
                              : crowd == kInBlock   ? " without sync_block between them"
                              : crowd == kInCluster ? " without sync_cluster between them"
                                                    : ", and nothing orders these blocks";
  violation(std::string(mine) + " byte " + std::to_string(offset) + " of " + name_ + ", which " + who + " " +
                theirs + (me ? "" : words_of(sites[other.site()])) + lacking,
            site);
}

void Allocation::refuse_copy_under_way(const char* what, Stamp write, size_t offset, const Site& site) const {
  violation(std::string(what) + " byte " + std::to_string(offset) + " of " + name_ +
                " while a copy_async of thread " + std::to_string(write.thread()) +
                words_of(sites[write.site()]) + " is under way",
            site);
}

void Allocation::read(const void* from, size_t size, size_t alignment, const Site& site, bool readonly) {
  const size_t offset = offset_of("reads", from, size, alignment, site);
  if (!engine.checks) return;
  const uint64_t forgotten = shadow_->forgotten();
  const Stamp now{present.stamp(site).bits | (readonly ? Stamp::kMark : 0)};
  for (size_t part = offset; part < offset + size; part += alignment) {
    const std::span<Granule> granules = shadow_->at(begin_ + part, alignment);
    for (Granule& granule : granules) {
      const auto byte = [&] {
        return part + static_cast<size_t>(&granule - &granules[0]) * alignment / granules.size();
      };
      if (granule.write.time() < forgotten) {
        violation("reads byte " + std::to_string(byte()) + " of " + name_ + ", which nobody has written",
                  site);
      }
      if (granule.write.marked()) refuse_copy_under_way("reads", granule.write, byte(), site);
      if (const Crowd crowd = present.with(granule.write, forgotten)) {
        race("reads", "wrote", byte(), granule.write, crowd, site);
      }
      if (const Crowd crowd = present.with(granule.atomic, forgotten)) {
        race("reads", "atomically updated", byte(), granule.atomic, crowd, site);
      }
      if (readonly && granule.write.time() >= present.launch_began) {
        violation("reads byte " + std::to_string(byte()) + " of " + name_ +
                      " as memory that nothing writes, but this kernel wrote it" +
                      words_of(sites[granule.write.site()]),
                  site);
      }
      const Crowd crowd = present.with(granule.read, forgotten);
      const bool marked = granule.read.marked() && granule.read.time() >= present.launch_began;
      if (!present.made(granule.read)) granule.read_before = granule.read;
      granule.read = {now.bits | crowd << Stamp::kWhoBits | (marked ? Stamp::kMark : 0)};
    }
  }
}

void Allocation::overwrite(const char* what, const void* to, size_t size, size_t alignment, Stamp now,
                           const Site& site) {
  const size_t offset = offset_of(what, to, size, alignment, site);
  if (!engine.checks) return;
  const uint64_t forgotten = shadow_->forgotten();
  for (size_t part = offset; part < offset + size; part += alignment) {
    const std::span<Granule> granules = shadow_->at(begin_ + part, alignment);
    for (Granule& granule : granules) {
      const auto byte = [&] {
        return part + static_cast<size_t>(&granule - &granules[0]) * alignment / granules.size();
      };
      if (granule.write.marked() && granule.write.time() >= forgotten) {
        refuse_copy_under_way(what, granule.write, byte(), site);
      }
      if (const Crowd crowd = present.with(granule.write, forgotten)) {
        race(what, "wrote", byte(), granule.write, crowd, site);
      }
      if (const Crowd crowd = present.with(granule.atomic, forgotten)) {
        race(what, "atomically updated", byte(), granule.atomic, crowd, site);
      }
      if (const Crowd crowd = present.with(granule.read, forgotten)) {
        race(what, "read", byte(), other_reader(granule, forgotten), crowd, site);
      }
      if (granule.read.marked() && granule.read.time() >= present.launch_began) {
        violation(std::string(what) + " byte " + std::to_string(byte()) + " of " + name_ +
                      ", which this kernel read as memory that nothing writes" +
                      words_of(sites[granule.read.site()]),
                  site);
      }
      granule = {now, {}, {}, {}};
    }
  }
}

void Allocation::write(const void* to, size_t size, size_t alignment, const Site& site) {
  overwrite("writes", to, size, alignment, present.stamp(site), site);
}

void Allocation::begin_copy(const void* to, const Site& site) {
  overwrite("copies to", to, 16, 16, {present.stamp(site).bits | Stamp::kMark}, site);
}

void Allocation::end_copy(const void* to, const Site& site) {
  if (!engine.checks) return;
  const auto offset = static_cast<size_t>(static_cast<const std::byte*>(to) - data_);
  for (Granule& granule : shadow_->at(begin_ + offset, 16)) granule = {present.stamp(site), {}, {}, {}};
}

void Allocation::atomic(const void* to, size_t size, const Site& site) {
  const size_t offset = offset_of("atomically updates", to, size, size, site);
  if (!engine.checks) return;
  const uint64_t forgotten = shadow_->forgotten();
  const std::span<Granule> granules = shadow_->at(begin_ + offset, size);
  for (Granule& granule : granules) {
    const auto byte = [&] {
      return offset + static_cast<size_t>(&granule - &granules[0]) * size / granules.size();
    };
    if (granule.write.time() < forgotten) {
      violation(
          "atomically updates byte " + std::to_string(byte()) + " of " + name_ + ", which nobody has written",
          site);
    }
    if (granule.write.marked()) refuse_copy_under_way("atomically updates", granule.write, byte(), site);
    if (const Crowd crowd = present.with(granule.write, forgotten)) {
      race("atomically updates", "wrote", byte(), granule.write, crowd, site);
    }
    if (const Crowd crowd = present.with(granule.read, forgotten)) {
      race("atomically updates", "read", byte(), other_reader(granule, forgotten), crowd, site);
    }
    granule.atomic = {present.stamp(site).bits | present.with(granule.atomic, forgotten) << Stamp::kWhoBits};
  }
}

DeviceMemory::DeviceMemory(std::string name, const void* contents, size_t bytes, size_t offset)
    : base_(static_cast<std::byte*>(
          std::aligned_alloc(kAlignment, (offset + bytes) / kAlignment * kAlignment + kAlignment))),
      shadow_(offset + bytes, contents != nullptr),
      allocation_(std::move(name), base_ + offset, bytes, false, &shadow_, offset) {
  if (contents != nullptr && bytes > 0) {
    std::memcpy(data(), contents, bytes);
  } else {
    noise(base_ + offset, bytes, engine.random);
  }
  memory[allocation_.data()] = &allocation_;
}

DeviceMemory::~DeviceMemory() {
  memory.erase(allocation_.data());
  std::free(base_);
}

Allocation* allocation_at(const void* p) {
  static Allocation nothing("memory that is not the device's", nullptr, 0, false, nullptr, 0);
  auto after = memory.upper_bound(static_cast<const std::byte*>(p));
  if (after == memory.begin()) return &nothing;
  Allocation* const candidate = std::prev(after)->second;
  // One past the end still belongs to it: kernels form such pointers without using them.
  return p <= candidate->data() + candidate->bytes() ? candidate : &nothing;
}

// ---- the running thread ----

void violation(const std::string& what, const Site& site) {
  const std::string who = engine.running == nullptr ? "the host" : words_of(*engine.running);
  refuse(who + words_of(site) + " " + what);
}

void require_capability(int capability, const char* what, const Site& site) {
  if (engine.device.capability < capability) {
    violation(std::string("calls ") + what + ", which needs sm_" + std::to_string(capability) + ", on sm_" +
                  std::to_string(engine.device.capability),
              site);
  }
}

void sync_block_fiber(const Site& site) {
  meet(*engine.running->block, "sync_block", site, true);
}

void sync_cluster_fiber(const Site& site) {
  require_capability(90, "sync_cluster", site);
  meet(*engine.running->block->cluster, "sync_cluster", site, true);
}

const ExchangeSlots& exchange(const char* what, const void* mine, size_t size, const Site& site,
                              bool barrier) {
  Warp& warp = warp_of(*engine.running);
  // Two sets of slots: a fast lane may be one collective ahead of a slow one, never two.
  ExchangeSlots& slots = warp.slots[warp.meetings % 2];
  if (size > 0)
    std::memcpy(slots[static_cast<size_t>(engine.running->where.thread % kWarp)].bytes, mine, size);
  meet(warp, what, site, barrier);
  return slots;
}

int sync_block_count_fiber(const char* what, bool predicate, const Site& site) {
  Block& block = *engine.running->block;
  int& votes = block.votes[block.meetings % 2];
  if (block.arrived.empty()) votes = 0;
  votes += predicate;
  meet(block, what, site, true);
  return votes;
}

Allocation* shared_piece(int64_t begin, int64_t bytes, const Site& site) {
  Block& block = *engine.running->block;
  if (bytes < 0 || begin + bytes > engine.shape.shared_bytes) {
    violation("takes bytes [" + std::to_string(begin) + ", " + std::to_string(begin + bytes) +
                  ") of the dynamic shared memory, which has " + std::to_string(engine.shape.shared_bytes),
              site);
  }
  const auto found = block.dynamic_pieces.find({begin, bytes});
  if (found != block.dynamic_pieces.end()) return &found->second;
  Allocation piece("shared memory [" + std::to_string(begin) + ", " + std::to_string(begin + bytes) + ")",
                   block.dynamic->data.get() + begin, static_cast<size_t>(bytes), true,
                   &block.dynamic->shadow, static_cast<size_t>(begin));
  return &block.dynamic_pieces.emplace(std::pair(begin, bytes), std::move(piece)).first->second;
}

Allocation* static_shared_piece(const void* key, const char* name, int64_t bytes, const Site& site) {
  Block& block = *engine.running->block;
  std::unique_ptr<StaticPiece>& piece = block.static_pieces[key];
  if (piece) return &piece->allocation;
  block.static_bytes += bytes;
  // A test may play a device with less than any has, for the sake of its plan.
  const int64_t most = std::max(engine.device.shared_bytes, kMaxStaticShared);
  if (block.static_bytes > kMaxStaticShared || block.static_bytes + engine.shape.shared_bytes > most) {
    violation("has " + std::to_string(block.static_bytes) + " bytes of static and " +
                  std::to_string(engine.shape.shared_bytes) + " of dynamic shared memory, more than " +
                  std::to_string(kMaxStaticShared) + " static or " + std::to_string(most) + " in all",
              site);
  }
  piece = std::make_unique<StaticPiece>(name, static_cast<size_t>(bytes));
  piece->memory.begin(engine.random);
  return &piece->allocation;
}

void copy_async_fiber(Allocation* to, std::byte* target, Allocation* from, const std::byte* source,
                      bool valid, const Site& site) {
  PendingCopy copy{engine.running->group, to, from, target, valid ? source : nullptr, {}};
  to->require(true, "copy_async", site);
  if (valid) {
    from->require(false, "copy_async from", site);
    from->read(source, 16, 16, site);
    std::memcpy(copy.bytes.data(), source, 16);
  }
  to->begin_copy(target, site);
  engine.running->copies.push_back(copy);
}

void copy_async_commit_fiber() {
  ++engine.running->group;
}

void copy_async_wait_fiber(int pending, const Site& site) {
  std::vector<PendingCopy>& copies = engine.running->copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group < engine.running->group - pending; ++copy) {
    if (copy->source != nullptr) {
      copy->from->read(copy->source, 16, 16, site);
      if (engine.checks && std::memcmp(copy->source, copy->bytes.data(), 16) != 0) {
        violation("waits for a copy_async from memory that was written meanwhile", site);
      }
    }
    copy->to->end_copy(copy->target, site);
    std::memcpy(copy->target, copy->bytes.data(), 16);
  }
  copies.erase(copies.begin(), copy);
}

// ---- running ----

void seed(uint64_t value) {
  engine.seed = value + seed_shift();
  engine.random.state = engine.seed;
}

uint32_t launches() {
  return engine.launches;
}

void check_accesses(bool on) {
  engine.checks = on;
}

CudaStatus run(const CudaContext& context, const LaunchShape& shape, const char* name,
               const std::function<void()>& kernel) {
  constexpr int64_t kMaxX = (1ll << 31) - 1, kMaxYZ = 65535;
  if (shape.x < 1 || shape.y < 1 || shape.z < 1 || shape.x > kMaxX || shape.y > kMaxYZ || shape.z > kMaxYZ ||
      shape.threads < 1 || shape.threads > 1024 || shape.cluster < 1 || shape.cluster > 8 ||
      shape.x % shape.cluster != 0 || shape.shared_bytes < 0 ||
      shape.shared_bytes > context.device.shared_bytes ||
      (shape.cluster > 1 && context.device.capability < 90)) {
    return {kCudaInvalidValue, name};
  }
  struct End {
    ~End() { engine.kernel.clear(); }
  } end;
  engine.kernel = name;
  if (engine.kernel.front() == '(') engine.kernel = engine.kernel.substr(1, engine.kernel.size() - 2);
  if (shape.threads % kWarp != 0) refuse(std::to_string(shape.threads) + " threads are not whole warps");
  engine.shape = shape;
  engine.device = context.device;
  ++engine.launches;

  std::vector<std::array<int64_t, 3>> clusters;
  for (int64_t z = 0; z < shape.z; ++z) {
    for (int64_t y = 0; y < shape.y; ++y) {
      for (int64_t x = 0; x < shape.x; x += shape.cluster) clusters.push_back({x, y, z});
    }
  }
  std::shuffle(clusters.begin(), clusters.end(), engine.random);
  engine.clusters.clear();
  present = {};
  present.launch_began = tick();
  Group cluster;
  std::vector<Block> blocks = make_blocks(shape, &cluster);
  for (const auto& at : clusters) {
    present.cluster_began = tick();
    engine.clusters.emplace_back(engine.time, at);
    cluster.begin(shape.cluster * shape.threads);
    for (Block& block : blocks) {
      begin(block, at[0] + static_cast<int64_t>(block.in_cluster), at[1], at[2]);
    }
    run_blocks(blocks, kernel);
  }
  return {};
}

}  // namespace csp::simt
