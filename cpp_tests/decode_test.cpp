#include "csp/decode.h"

#include "support.h"

namespace csp::test {
namespace {
TEST(Decode, Builds) { DecodeParams p; decode_cpu(p, nullptr); }
}
}
