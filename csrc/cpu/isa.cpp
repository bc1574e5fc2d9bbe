// Picks the instruction set, once, and forwards to it.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace resnet_fast::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const BnAct* bn_act;
  const BnActBackward* bn_act_backward;
  const Stem* stem;
  const StemBackward* stem_backward;
  const Winograd* winograd;
  const WinogradGradient* winograd_gradient;
  const Pointwise* pointwise;
  const Direct* direct;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
const Isa ISAS[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, &avx512::bn_act, &avx512::bn_act_backward, &avx512::stem,
     &avx512::stem_backward, &avx512::winograd, &avx512::winograd_gradient, &avx512::pointwise,
     &avx512::direct},
    {"avx2", has_avx2, &avx2::bn_act, &avx2::bn_act_backward, &avx2::stem, &avx2::stem_backward,
     &avx2::winograd, &avx2::winograd_gradient, &avx2::pointwise, &avx2::direct},
#endif
    {"baseline", [] { return true; }, &baseline::bn_act, &baseline::bn_act_backward,
     &baseline::stem, &baseline::stem_backward, &baseline::winograd, &baseline::winograd_gradient,
     &baseline::pointwise, &baseline::direct},
};

const Isa& choose() {
  const char* wanted = std::getenv("RESNET_FAST_ISA");
  for (const Isa& isa : ISAS) {
    if ((!wanted || !*wanted || std::string(wanted) == isa.name) && isa.supported()) return isa;
  }
  throw std::runtime_error("RESNET_FAST_ISA=" + std::string(wanted) +
                           ": not built, or this CPU does not have it");
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

const BnAct& bn_act() { return *chosen().bn_act; }
const BnActBackward& bn_act_backward() { return *chosen().bn_act_backward; }
const Stem& stem() { return *chosen().stem; }
const StemBackward& stem_backward() { return *chosen().stem_backward; }
const Winograd& winograd() { return *chosen().winograd; }
const WinogradGradient& winograd_gradient() { return *chosen().winograd_gradient; }
const Pointwise& pointwise() { return *chosen().pointwise; }
const Direct& direct() { return *chosen().direct; }

}  // namespace

const char* isa() { return chosen().name; }

int64_t bn_workspace(int64_t npq, int64_t k) { return bn_act().bn_workspace(npq, k); }
void bn_stats(const BnStats& args) { bn_act().bn_stats(args); }
void bn_finalize(const BnFinalize& args) { bn_act().bn_finalize(args); }
void affine_act(const AffineAct& args) { bn_act().affine_act(args); }
void affine_act_backward(const AffineActBackward& args) {
  bn_act_backward().affine_act_backward(args);
}
void bn_backward_sums(const BnBackwardSums& args) { bn_act_backward().bn_backward_sums(args); }
void bn_backward_finalize(const BnBackwardFinalize& args) {
  bn_act_backward().bn_backward_finalize(args);
}
void bn_backward_apply(const BnBackwardApply& args) { bn_act_backward().bn_backward_apply(args); }
void affine_act_maxpool(const AffineActMaxpool& args) { stem().affine_act_maxpool(args); }
void maxpool_backward_sums(const MaxpoolBackwardSums& args) {
  stem_backward().maxpool_backward_sums(args);
}
void maxpool_backward_apply(const MaxpoolBackwardApply& args) {
  stem_backward().maxpool_backward_apply(args);
}
int64_t winograd_weight_size(int64_t c, int64_t k) { return winograd().winograd_weight_size(c, k); }
void winograd_weight(const WinogradWeight& args) { winograd().winograd_weight(args); }
int64_t winograd_workspace(const WinogradConv& args) { return winograd().winograd_workspace(args); }
void winograd_conv(const WinogradConv& args) { winograd().winograd_conv(args); }
int64_t winograd_wgrad_units(const WinogradWgrad& args) {
  return winograd_gradient().winograd_wgrad_units(args);
}
int64_t winograd_wgrad_workspace(const WinogradWgrad& args) {
  return winograd_gradient().winograd_wgrad_workspace(args);
}
void winograd_wgrad(const WinogradWgrad& args) { winograd_gradient().winograd_wgrad(args); }
int64_t pointwise_backward_units(const PointwiseBackward& args) {
  return pointwise().pointwise_backward_units(args);
}
int64_t pointwise_backward_workspace(const PointwiseBackward& args) {
  return pointwise().pointwise_backward_workspace(args);
}
void pointwise_backward(const PointwiseBackward& args) { pointwise().pointwise_backward(args); }
int64_t direct_panel() { return direct().direct_panel(); }
int64_t direct_workspace(const DirectConv& args) { return direct().direct_workspace(args); }
void direct_conv(const DirectConv& args) { direct().direct_conv(args); }

}  // namespace resnet_fast::cpu
