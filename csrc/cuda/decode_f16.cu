#include "decode_launch.cuh"

namespace csp {

template CudaStatus launch_decode<DType::kFloat16>(const DecodeParams&, const DecodeCudaPlan&,
                                                   const CudaContext&);

}  // namespace csp
