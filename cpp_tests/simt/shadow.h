#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <span>
#include <string>
#include <vector>

// What the harness remembers of every byte that a kernel may touch: who wrote it, who read it, and when.
namespace csp::simt {

// A line of a kernel.
using Site = std::source_location;

// Sites by small numbers; 0 is a site that is not known.
uint64_t number_of(const Site& site);
std::string words_of_site(uint64_t number);  // " at file:line", or nothing

// One access, or the latest of several that nothing orders. Time counts the barriers of the whole process, so
// an access lies before a barrier exactly if its time is less than the barrier's.
struct Stamp {
  static constexpr int kThreadBits = 10, kWhoBits = 13, kCrowdBits = 3, kSiteBits = 13;
  static constexpr int kMarkAt = kWhoBits + kCrowdBits, kSiteAt = kMarkAt + 1, kTimeAt = kSiteAt + kSiteBits;
  static constexpr uint64_t kMark = uint64_t{1} << kMarkAt;

  uint64_t bits = 0;

  uint64_t time() const { return bits >> kTimeAt; }
  uint64_t who() const { return bits & ((1u << kWhoBits) - 1); }  // block in its cluster, then thread
  uint64_t thread() const { return bits & ((1u << kThreadBits) - 1); }
  uint64_t crowd() const { return bits >> kWhoBits & ((1u << kCrowdBits) - 1); }
  uint64_t site() const { return bits >> kSiteAt & ((1u << kSiteBits) - 1); }
  // Of a write: an asynchronous copy that has not been waited for. Of a read: one by load_readonly.
  bool marked() const { return (bits & kMark) != 0; }
};

// The smallest group in which accesses met that nothing orders.
enum Crowd : uint64_t { kAlone, kInWarp, kInBlock, kInCluster, kInGrid };

// The running thread: itself, the time, and the last barrier of each group that it is a member of.
struct Present {
  uint64_t who = 0, time = 0;
  uint64_t warp = 0, block = 0, cluster = 0;
  uint64_t cluster_began = 0, launch_began = 0;

  Stamp stamp(const Site& site) const {
    return {who | number_of(site) << Stamp::kSiteAt | time << Stamp::kTimeAt};
  }

  bool made(Stamp earlier) const { return earlier.who() == who && earlier.time() >= cluster_began; }

  // kAlone if all accesses behind `earlier` are this thread's own or before a barrier that it has passed.
  // Clusters run one after the other, so the time tells whether `earlier` is of this one. What happened
  // before `forgotten` does not count.
  Crowd with(Stamp earlier, uint64_t forgotten) const {
    constexpr int kWarpBits = 5;
    const uint64_t when = earlier.time(), crowd = earlier.crowd(), differs = earlier.who() ^ who;
    if (when < forgotten || when < launch_began) return kAlone;
    if (when < cluster_began || crowd == kInGrid) return kInGrid;
    if (when < cluster) return kAlone;
    if (differs >> Stamp::kThreadBits != 0 || crowd == kInCluster) return kInCluster;
    if (when < block) return kAlone;
    if (differs >> kWarpBits != 0 || crowd == kInBlock) return kInBlock;
    if (when < warp) return kAlone;
    return differs != 0 || crowd == kInWarp ? kInWarp : kAlone;
  }
};

inline Present present;

// A few neighbouring bytes that every access so far took as one. Of the reads, and of the atomics, one stamp
// is enough: it is the latest, with the crowd of those that it is not ordered after; the others are before
// it.
struct Granule {
  Stamp write;  // the last one; a byte that nobody wrote has time 0
  Stamp read;
  Stamp atomic;
  Stamp read_before;  // the latest read of another thread than that one, only to name it
};

// The granules of a range of bytes, made when they are first touched, and as fine as the finest access.
class Shadow {
 public:
  // `written` before any kernel ran, or full of noise.
  Shadow(size_t bytes, bool written)
      : chunks_((bytes + kChunkBytes - 1) / kChunkBytes),
        initial_{written ? uint64_t{1} << Stamp::kTimeAt : 0} {}

  // From now on nobody has written, read or updated anything.
  void forget(uint64_t now) { forgotten_ = now; }
  uint64_t forgotten() const { return forgotten_; }

  // `size` is a power of two, at most 16, that divides `offset`.
  std::span<Granule> at(size_t offset, size_t size) {
    Chunk& chunk = chunks_[offset / kChunkBytes];
    const int shift = std::countr_zero(size);
    if (shift < chunk.shift) refine(chunk, shift);
    return {&chunk.granules[offset % kChunkBytes >> chunk.shift], size >> chunk.shift};
  }

 private:
  static constexpr size_t kChunkBytes = 4096;

  struct Chunk {
    int shift = 5;  // coarser than any access: nothing there yet
    std::unique_ptr<Granule[]> granules;
  };

  void refine(Chunk& chunk, int shift) {
    const size_t count = kChunkBytes >> shift;
    auto finer = std::make_unique<Granule[]>(count);
    for (size_t i = 0; i < count; ++i) {
      finer[i] = chunk.granules ? chunk.granules[i >> (chunk.shift - shift)] : Granule{initial_, {}, {}, {}};
    }
    chunk.granules = std::move(finer);
    chunk.shift = shift;
  }

  std::vector<Chunk> chunks_;
  Stamp initial_;
  uint64_t forgotten_ = 1;
};

}  // namespace csp::simt
