// Every C++ op, in namespaces cpu and cuda. Pointers, sizes and a stream: nothing here allocates,
// and nothing knows torch.
//
// Matrices are channels-last, (npq, k) row-major, of storage type `dtype`. Everything per channel
// is float32 of shape (k,). A null pointer is an absent operand. npq may be 0: statistics and sums
// are then 0. Outputs may alias inputs of the same shape where the op says so.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "types.h"

namespace resnet_fast {

using Stream = void*;  // a cudaStream_t; cpu ignores it

/// mean = average of y, var = sum of (y - mean)^2 / max(npq - 1, 1), the unbiased variance;
/// rstd = 1 / sqrt(biased variance + eps), scale = gamma * rstd, shift = beta - mean * scale.
/// gamma (1) and beta (0) may be absent.
struct BnStats {
  const void* y;
  const float* gamma;
  const float* beta;
  float* mean;
  float* var;
  float* rstd;
  float* scale;
  float* shift;
  float* workspace;
  int64_t npq, k;
  float eps;
  DType dtype;
  Stream stream;
};

/// The same of the union of `parts` parts: n (parts,) values each, means and unbiased vars (parts,
/// k). A part may be empty.
struct BnFinalize {
  const float* n;
  const float* means;
  const float* vars;
  const float* gamma;
  const float* beta;
  float* mean;
  float* var;
  float* rstd;
  float* scale;
  float* shift;
  int64_t parts, k;
  float eps;
  Stream stream;
};

/// z = act(y * scale + shift + residual), or, with rscale and rshift,
/// z = act(y * scale + shift + residual * rscale + rshift); act is ReLU or nothing.
/// z may alias y or residual. mask, which may be absent, is (npq, ceil(k / 8)) bytes: bit i of byte
/// j is set where z of channel 8 * j + i, as stored, is > 0 or NaN; the bits behind k are 0.
struct AffineAct {
  const void* y;
  const float* scale;
  const float* shift;
  const void* residual;
  const float* rscale;
  const float* rshift;
  void* z;
  uint8_t* mask;
  int64_t npq, k;
  DType dtype;
  bool relu;
  Stream stream;
};

/// g = dz where z > 0 (or is NaN), else 0; sum_g = sum of g, sum_gy = sum of g * (y - mean) and,
/// with ry, sum_gry = sum of g * (ry - rmean). g may alias dz. Either z or mask (as AffineAct
/// writes it) is given.
struct AffineActBackward {
  const void* dz;
  const void* z;
  const uint8_t* mask;
  const void* y;
  const float* mean;
  const void* ry;
  const float* rmean;
  void* g;
  float* sum_g;
  float* sum_gy;
  float* sum_gry;
  float* workspace;
  int64_t npq, k;
  DType dtype;
  Stream stream;
};

/// sum_g = sum of g, sum_gy = sum of g * (y - mean), where g = dz where y * scale + shift > 0 (or
/// is NaN), else 0; without scale, g = dz.
struct BnBackwardSums {
  const void* dz;
  const void* y;
  const float* mean;
  const float* scale;
  const float* shift;
  float* sum_g;
  float* sum_gy;
  float* workspace;
  int64_t npq, k;
  DType dtype;
  Stream stream;
};

/// dy = a * g + b * (y - mean) + c, with g as in BnBackwardSums. dy may alias dz.
struct BnBackwardApply {
  const void* dz;
  const void* y;
  const float* mean;
  const float* a;
  const float* b;
  const float* c;
  const float* scale;
  const float* shift;
  void* dy;
  int64_t npq, k;
  DType dtype;
  Stream stream;
};

/// b = -scale * rstd^2 * sum_gy / n, c = -scale * sum_g / n (both 0 where n = 0), dgamma = rstd *
/// sum_gy.
struct BnBackwardFinalize {
  const float* sum_g;
  const float* sum_gy;
  const float* rstd;
  const float* scale;
  float* b;
  float* c;
  float* dgamma;
  double n;
  int64_t k;
  Stream stream;
};

/// z = max of relu(y * scale + shift) over windows of 3 x 3, stride 2, padding 1: y is (n, h, w,
/// k), z (n, p, q, k) with p = (h - 1) / 2 + 1, q likewise. index, (n, p, q, k): 3 * r + s of the
/// value that won, or 9 where z is not > 0 and not NaN. Values are compared as stored; of equal
/// ones the first wins, a NaN over all.
struct AffineActMaxpool {
  const void* y;
  const float* scale;
  const float* shift;
  void* z;
  uint8_t* index;
  int64_t n, h, w, k;
  DType dtype;
  Stream stream;
};

/// sum_g = sum of g, sum_gy = sum of g * (y - mean), where g (n, h, w, k) is the sum of the dz (n,
/// p, q, k) whose index points there. workspace as bn_workspace(n * h * w, k).
struct MaxpoolBackwardSums {
  const void* dz;
  const uint8_t* index;
  const void* y;
  const float* mean;
  float* sum_g;
  float* sum_gy;
  float* workspace;
  int64_t n, h, w, k;
  DType dtype;
  Stream stream;
};

/// dy = a * g + b * (y - mean) + c, with g as in MaxpoolBackwardSums. dy may alias y.
struct MaxpoolBackwardApply {
  const void* dz;
  const uint8_t* index;
  const void* y;
  const float* mean;
  const float* a;
  const float* b;
  const float* c;
  void* dy;
  int64_t n, h, w, k;
  DType dtype;
  Stream stream;
};

/// u = the filters w, 3 x 3, as winograd_conv reads them: winograd_weight_size(c, k) floats. Tap
/// (r, s) of input channel c and output channel k lies at w + k * k_stride + c * c_stride + (3 * r
/// + s)
/// * tap_stride, or with `flip` at tap (2 - r, 2 - s). dtype is that of winograd_conv's operands.
struct WinogradWeight {
  const float* w;
  float* u;
  int64_t c, k, c_stride, k_stride, tap_stride;
  bool flip;
  DType dtype;
};

/// z = act(conv(x, w) + shift + residual), 3 x 3, stride 1, padding 1: x is (n, h, w, c), z and
/// residual (n, h, w, k), u what winograd_weight made of w. act is ReLU or nothing; shift and
/// residual may be absent; z may alias residual. workspace: winograd_workspace floats, for at most
/// `threads` threads. A NaN or an infinity in x spreads over the tiles of outputs that it touches.
struct WinogradConv {
  const void* x;
  const float* u;
  const float* shift;
  const void* residual;
  void* z;
  float* workspace;
  int64_t n, h, w, c, k, threads;
  DType dtype;
  bool relu;
};

/// dw = the gradient of the filters of such a convolution: dy is (n, h, w, k), x (n, h, w, c), dw
/// (k, 3, 3, c). Behind scale and shift (c,), if there are any, x is act(x * scale + shift), act
/// ReLU. workspace: winograd_wgrad_workspace floats, for at most `threads` threads. A NaN or an
/// infinity in x or dy spreads over all taps. winograd_wgrad_units: how many threads find work.
struct WinogradWgrad {
  const void* dy;
  const void* x;
  const float* scale;
  const float* shift;
  float* dw;
  float* workspace;
  int64_t n, h, w, c, k, threads;
  DType dtype;
};

/// Channels that pointwise_backward takes, in and out.
constexpr int64_t POINTWISE_CHANNELS = 1024;

/// The gradients of a convolution 1 x 1, stride 1: dx = dy x w + residual and dw = the transpose of
/// dy x act(x), where g, y (npq, k), x, dx, residual (npq, channels), w, dw (k, channels). dy is g;
/// with y as in BnBackwardApply, gscale and gshift its scale and shift. act(x) is relu(x * scale +
/// shift), without scale x. dx, dw or residual may be absent; dx may alias residual. workspace:
/// pointwise_backward_workspace floats, for at most `threads` threads. pointwise_backward_units:
/// how many threads find work.
struct PointwiseBackward {
  const void* g;
  const void* y;
  const float* mean;
  const float* a;
  const float* b;
  const float* c;
  const float* gscale;
  const float* gshift;
  const void* x;
  const float* scale;
  const float* shift;
  const float* w;
  const void* residual;
  void* dx;
  float* dw;
  float* workspace;
  int64_t npq, channels, k, threads;
  DType dtype;
};

/// z = act(conv(x, w) + shift + residual), without dilation and groups: x is (n, h, w, c), z and
/// residual (n, p, q, k), weights (ceil(k / panel), r, s, c, panel) with 0 behind the last output
/// channel, where `panel` is direct_panel(). act is ReLU or nothing; shift and residual may be
/// absent; z may alias residual. workspace: direct_workspace floats, for at most `threads` threads.
struct DirectConv {
  const float* x;
  const float* weights;
  const float* shift;
  const float* residual;
  float* z;
  float* workspace;
  int64_t n, h, w, c, k, r, s, p, q, stride_h, stride_w, padding_h, padding_w, threads;
  bool relu;
};

/// A residual bottleneck in inference: a1 = relu(conv1x1(x, w1) * scale1 + shift1), a2 =
/// relu(conv3x3(a1, w2) * scale2 + shift2) with padding 1, z = relu(conv1x1(a2, w3) * scale3 +
/// shift3 + shortcut); the shortcut is x (c = k) or, with rw, conv1x1(x, rw) * rscale + rshift.
/// Images x (n, h, w, c) and z (n, h, w, k), weights (out, r, s, in), all of `dtype`, bfloat16 or
/// float16, on 16 bytes. c and k are multiples of 64, c is 64 with rw; bottleneck_shared() names
/// the widths. z may not alias x.
struct Bottleneck {
  const void* x;
  const void* w1;
  const float* scale1;
  const float* shift1;
  const void* w2;
  const float* scale2;
  const float* shift2;
  const void* w3;
  const float* scale3;
  const float* shift3;
  const void* rw;
  const float* rscale;
  const float* rshift;
  void* z;
  int64_t n, h, w, c, width, k;
  DType dtype;
  Stream stream;
};

/// A stem in inference: z = maxpool(relu(conv7x7(x, weight) * scale + shift)); stride 2 and padding
/// 3, then 3 x 3, stride 2 and padding 1. Images x (n, h, w, 3) and z (n, p, q, 64), p = ceil(h /
/// 4) and q = ceil(w / 4), weight (64, 7, 7, 3), all of `dtype`, bfloat16 or float16; z on 16
/// bytes.
struct WholeStem {
  const void* x;
  const void* weight;
  const float* scale;
  const float* shift;
  void* z;
  int64_t n, h, w;
  DType dtype;
  Stream stream;
};

/// The ops on these, as one backend has them or, on the CPU, one instruction set.
struct BnAct {
  int64_t (*bn_workspace)(int64_t npq, int64_t k);
  void (*bn_stats)(const BnStats&);
  void (*bn_finalize)(const BnFinalize&);
  void (*affine_act)(const AffineAct&);
};

struct BnActBackward {
  void (*affine_act_backward)(const AffineActBackward&);
  void (*bn_backward_sums)(const BnBackwardSums&);
  void (*bn_backward_finalize)(const BnBackwardFinalize&);
  void (*bn_backward_apply)(const BnBackwardApply&);
};

struct Stem {
  void (*affine_act_maxpool)(const AffineActMaxpool&);
};

struct StemBackward {
  void (*maxpool_backward_sums)(const MaxpoolBackwardSums&);
  void (*maxpool_backward_apply)(const MaxpoolBackwardApply&);
};

struct Winograd {
  int64_t (*winograd_weight_size)(int64_t c, int64_t k);
  void (*winograd_weight)(const WinogradWeight&);
  int64_t (*winograd_workspace)(const WinogradConv&);
  void (*winograd_conv)(const WinogradConv&);
};

struct WinogradGradient {
  int64_t (*winograd_wgrad_units)(const WinogradWgrad&);
  int64_t (*winograd_wgrad_workspace)(const WinogradWgrad&);
  void (*winograd_wgrad)(const WinogradWgrad&);
};

struct Pointwise {
  int64_t (*pointwise_backward_units)(const PointwiseBackward&);
  int64_t (*pointwise_backward_workspace)(const PointwiseBackward&);
  void (*pointwise_backward)(const PointwiseBackward&);
};

struct Direct {
  int64_t (*direct_panel)();
  int64_t (*direct_workspace)(const DirectConv&);
  void (*direct_conv)(const DirectConv&);
};

namespace cpu {

/// Floats of workspace that any of the reductions below needs.
int64_t bn_workspace(int64_t npq, int64_t k);
void bn_stats(const BnStats& args);
void bn_finalize(const BnFinalize& args);
void affine_act(const AffineAct& args);
void affine_act_backward(const AffineActBackward& args);
void bn_backward_sums(const BnBackwardSums& args);
void bn_backward_finalize(const BnBackwardFinalize& args);
void bn_backward_apply(const BnBackwardApply& args);
void affine_act_maxpool(const AffineActMaxpool& args);
void maxpool_backward_sums(const MaxpoolBackwardSums& args);
void maxpool_backward_apply(const MaxpoolBackwardApply& args);
int64_t winograd_weight_size(int64_t c, int64_t k);
void winograd_weight(const WinogradWeight& args);
int64_t winograd_workspace(const WinogradConv& args);
void winograd_conv(const WinogradConv& args);
int64_t winograd_wgrad_units(const WinogradWgrad& args);
int64_t winograd_wgrad_workspace(const WinogradWgrad& args);
void winograd_wgrad(const WinogradWgrad& args);
int64_t pointwise_backward_units(const PointwiseBackward& args);
int64_t pointwise_backward_workspace(const PointwiseBackward& args);
void pointwise_backward(const PointwiseBackward& args);
int64_t direct_panel();
int64_t direct_workspace(const DirectConv& args);
void direct_conv(const DirectConv& args);

/// The instruction set that the ops above run on, chosen once: the best one that this CPU has, or
/// the one that the environment variable RESNET_FAST_ISA names.
const char* isa();

/// Memory, on the host.
struct Span {
  const void* address;
  int64_t nbytes;
};

/// A 64-bit hash of buffers, taken again and again: of every byte of those of at most `whole`
/// bytes (8 or more), of one 8-byte word in every `stride` bytes and of the last word of the
/// others, and of their lengths. The buffers must stay where they are.
class Fingerprint {
 public:
  Fingerprint(const std::vector<Span>& spans, int64_t whole, int64_t stride);
  uint64_t value() const;

 private:
  static constexpr int64_t PARTS = 8;  // for the threads; the value does not depend on how many
  uint64_t part(int64_t index) const;

  std::vector<Span> whole_;
  std::vector<const char*> sampled_;
  uint64_t lengths_ = 0;  // of the sampled ones
};

/// a += factor * (b - a), elementwise: running statistics on their way to a batch's.
void lerp(float* a, const float* b, int64_t size, float factor);

/// Asks for pages of 2 MB in place of small ones wherever a whole one lies in the span, whose bytes
/// stay as they are; for memory that is read again and again. Returns the bytes that got them: 0
/// where the system has none.
int64_t huge_pages(const Span& span);

/// The library that serves OpenMP in this process, and the threads it would use.
struct OpenMP {
  int max_threads;
  std::string runtime;
};
OpenMP openmp_info();

}  // namespace cpu

namespace cuda {

int64_t bn_workspace(int64_t npq, int64_t k);
void bn_stats(const BnStats& args);
void bn_finalize(const BnFinalize& args);
void affine_act(const AffineAct& args);
void affine_act_backward(const AffineActBackward& args);
void bn_backward_sums(const BnBackwardSums& args);
void bn_backward_finalize(const BnBackwardFinalize& args);
void bn_backward_apply(const BnBackwardApply& args);
void affine_act_maxpool(const AffineActMaxpool& args);
void maxpool_backward_sums(const MaxpoolBackwardSums& args);
void maxpool_backward_apply(const MaxpoolBackwardApply& args);

void bottleneck(const Bottleneck& args);
void whole_stem(const WholeStem& args);

/// Bytes of shared memory that whole_stem() needs.
int64_t whole_stem_shared();

/// Bytes of shared memory that bottleneck() needs for these sizes, or -1 where it has no kernel:
/// with all weights in it (`resident`, done where the device has so much), or streamed through it.
int64_t bottleneck_shared(int64_t c, int64_t width, int64_t k, bool projection, bool resident);

/// Bytes of shared memory that a block of threads may have on the current device.
int64_t shared_limit();

/// Empty if the driver can serve the CUDA runtime linked in here, else the reason why not.
std::string driver_ok();

}  // namespace cuda

}  // namespace resnet_fast
