// bn_act.cpp, stem.cpp, their _backward.cpp, pointwise_backward.cpp, winograd.cpp,
// winograd_wgrad.cpp and direct.cpp as they were compiled for each instruction set.
#pragma once

#include "../resnet_fast.h"

namespace resnet_fast::cpu {

namespace baseline {
extern const BnAct bn_act;
extern const BnActBackward bn_act_backward;
extern const Stem stem;
extern const StemBackward stem_backward;
extern const Winograd winograd;
extern const WinogradGradient winograd_gradient;
extern const Pointwise pointwise;
extern const Direct direct;
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2 {
extern const BnAct bn_act;
extern const BnActBackward bn_act_backward;
extern const Stem stem;
extern const StemBackward stem_backward;
extern const Winograd winograd;
extern const WinogradGradient winograd_gradient;
extern const Pointwise pointwise;
extern const Direct direct;
}  // namespace avx2

namespace avx512 {
extern const BnAct bn_act;
extern const BnActBackward bn_act_backward;
extern const Stem stem;
extern const StemBackward stem_backward;
extern const Winograd winograd;
extern const WinogradGradient winograd_gradient;
extern const Pointwise pointwise;
extern const Direct direct;
}  // namespace avx512
#endif

}  // namespace resnet_fast::cpu
