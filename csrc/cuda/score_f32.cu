#include "score_launch.cuh"

namespace csp {

template CudaStatus launch_score<DType::kFloat32>(const ScoreParams&, const ScoreCudaPlan&,
                                                  const CudaContext&);

}  // namespace csp
