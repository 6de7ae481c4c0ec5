#include "csp/prune.h"

#include "prune_problem.h"

namespace csp::test {
namespace {

class Prune : public PerIsaAndDType {};

void run(PruneProblem& problem, const Parallel& parallel = {}) {
  const Workspace workspace(prune_cpu_workspace_bytes(problem.params, parallel.num_threads));
  prune_cpu(problem.params, workspace.get(), parallel);
}

void run_parts(PruneProblem& problem) {
  choose_by_parts(problem);
  compact_cpu(problem.params.compact);
}

void expect_equal(const PruneProblem& a, const PruneProblem& b) {
  EXPECT_EQ(a.indices, b.indices);
  EXPECT_EQ(a.lengths, b.lengths);
  EXPECT_EQ(a.key_out.bytes(), b.key_out.bytes());
  EXPECT_EQ(a.value_out.bytes(), b.value_out.bytes());
}

TEST_P(Prune, IsItsPartsBitForBit) {
  for (const Heads heads : {Heads::kKv, Heads::kShared}) {
    PruneProblem whole(dtype(), heads), parts(dtype(), heads);
    run(whole);
    run_parts(parts);
    expect_equal(whole, parts);
    EXPECT_EQ(whole.lengths[0], PruneProblem::kBudget);
  }
}

TEST_P(Prune, ThreadsDoNotChangeABit) {
  for (const Heads heads : {Heads::kKv, Heads::kShared}) {
    PruneProblem one(dtype(), heads), two(dtype(), heads);
    run(one);
    run(two, threads(2));
    expect_equal(one, two);
  }
}

CSP_INSTANTIATE(Prune);

}  // namespace
}  // namespace csp::test
