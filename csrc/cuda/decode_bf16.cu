#include "decode_launch.cuh"

namespace csp {

template CudaStatus launch_decode<DType::kBFloat16>(const DecodeParams&, const DecodeCudaPlan&,
                                                    const CudaContext&);

}  // namespace csp
