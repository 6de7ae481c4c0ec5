// In the harness; csp_cuda_tests compiles the same for the GPU.
#include "cuda/primitives_test.cu"
