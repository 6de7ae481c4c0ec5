#include "score_launch.cuh"

namespace csp {

template CudaStatus launch_score<DType::kBFloat16>(const ScoreParams&, const ScoreCudaPlan&,
                                                   const CudaContext&);

}  // namespace csp
