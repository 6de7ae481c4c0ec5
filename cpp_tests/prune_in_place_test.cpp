#include "csp/prune_in_place.h"

#include "csp/plan.h"
#include "prune_problem.h"

namespace csp::test {
namespace {

class PruneInPlace : public PerIsaAndDType {};

// A problem that is solved in its own caches.
struct InPlace : PruneProblem {
  InPlace(DType type, Heads heads) : PruneProblem(type, heads) {
    params.compact.key_out = key.data();
    params.compact.value_out = value.data();
  }
};

void run(InPlace& problem, const Parallel& parallel = {}) {
  const Workspace workspace(prune_cpu_workspace_bytes(problem.params, parallel.num_threads));
  prune_in_place_cpu(problem.params, workspace.get(), parallel);
}

void expect_equal(const InPlace& a, const InPlace& b) {
  EXPECT_EQ(a.indices, b.indices);
  EXPECT_EQ(a.lengths, b.lengths);
  EXPECT_EQ(a.key.bytes(), b.key.bytes());
  EXPECT_EQ(a.value.bytes(), b.value.bytes());
}

TEST_P(PruneInPlace, IsItsPartsBitForBit) {
  for (const Heads heads : {Heads::kKv, Heads::kShared}) {
    InPlace whole(dtype(), heads), parts(dtype(), heads);
    run(whole);
    choose_by_parts(parts);
    compact_in_place_cpu(parts.params.compact);
    expect_equal(whole, parts);
    EXPECT_EQ(whole.lengths[0], PruneProblem::kBudget);
  }
}

// The first slots of every head against what prune writes, the others against what they were.
void compare(const Buffer& before, const Buffer& after, const Buffer& pruned, int64_t element) {
  const auto slot = static_cast<size_t>(PruneProblem::kDim * element);
  const size_t head = PruneProblem::kKeys * slot, kept = PruneProblem::kBudget * slot;
  for (size_t h = 0; h < after.bytes().size() / head; ++h) {
    const unsigned char* const now = after.bytes().data() + h * head;
    EXPECT_EQ(std::memcmp(now, pruned.bytes().data() + h * kept, kept), 0) << "head " << h;
    EXPECT_EQ(std::memcmp(now + kept, before.bytes().data() + h * head + kept, head - kept), 0)
        << "behind the budget of head " << h;
  }
}

TEST_P(PruneInPlace, TheFirstSlotsAreWhatPruneWrites) {
  for (const Heads heads : {Heads::kKv, Heads::kShared}) {
    InPlace mine(dtype(), heads);
    PruneProblem other(dtype(), heads);
    run(mine);
    const Workspace workspace(prune_cpu_workspace_bytes(other.params, 1));
    prune_cpu(other.params, workspace.get());
    EXPECT_EQ(mine.indices, other.indices);
    EXPECT_EQ(mine.lengths, other.lengths);
    compare(other.key, mine.key, other.key_out, dtype_bytes(dtype()));
    compare(other.value, mine.value, other.value_out, dtype_bytes(dtype()));
  }
}

TEST_P(PruneInPlace, ThreadsDoNotChangeABit) {
  for (const Heads heads : {Heads::kKv, Heads::kShared}) {
    InPlace one(dtype(), heads), two(dtype(), heads);
    run(one);
    run(two, threads(2));
    expect_equal(one, two);
  }
}

TEST(PruneInPlacePlan, IsThatOfItsPartsInTheWorkspaceOfPrune) {
  const InPlace problem(DType::kFloat32, Heads::kKv);
  const PruneParams& p = problem.params;
  const Plan plan = plan_prune_in_place_cpu(p, 2);
  EXPECT_EQ(plan.workspace_bytes, static_cast<int64_t>(prune_cpu_workspace_bytes(p, 2)));
  EXPECT_EQ(plan.tasks,
            score_cpu_tasks(p.score) + select_cpu_tasks(p.select) + compact_in_place_cpu_tasks(p.compact));
}

CSP_INSTANTIATE(PruneInPlace);

}  // namespace
}  // namespace csp::test
