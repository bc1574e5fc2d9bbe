// bn_act.cpp as it was compiled for each instruction set.
#pragma once

#include "../resnet_fast.h"

namespace resnet_fast::cpu {

namespace baseline {
extern const BnAct bn_act;
}

#if defined(__x86_64__)
namespace avx2 {
extern const BnAct bn_act;
}

namespace avx512 {
extern const BnAct bn_act;
}
#endif

}  // namespace resnet_fast::cpu
