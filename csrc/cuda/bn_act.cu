// BatchNorm, ReLU and residual add around a convolution, and their backward: the twin of
// cpu/bn_act.cpp. Arithmetic is fp32 whatever the storage. Every reduction has two stages, blocks
// into the workspace and then the blocks in a fixed order; block shapes follow from the shape of
// the matrix alone, and there are no atomics: results are bitwise equal from run to run.
#include "common.cuh"

namespace resnet_fast::cuda {
namespace {

// Elementwise: enough blocks to fill any GPU several times, few enough that loading what is per
// channel costs little.
constexpr int64_t ELEMENTWISE_BLOCKS = 4096;
// Reductions: row blocks times channels, which bounds the workspace and the second stage.
constexpr int64_t PARTIALS = 262144;
constexpr int64_t MAX_ROW_BLOCKS = 2048;
constexpr int64_t MIN_BLOCK_NPQ = 64;
// The second stage: 8 channels are one 32-byte sector, and 64 threads share their row blocks.
constexpr int FINISH_CHANNELS = 8;
constexpr int FINISH_ROWS = 64;

/// How a reduction cuts the rows, whatever the storage type.
struct RowBlocks {
  int64_t block_npq, count;

  RowBlocks(int64_t npq, int64_t k) {
    int64_t limit = smaller(PARTIALS / k, MAX_ROW_BLOCKS);
    if (limit < 1) limit = 1;
    block_npq = cdiv(npq, limit);
    if (block_npq < MIN_BLOCK_NPQ) block_npq = MIN_BLOCK_NPQ;
    count = cdiv(npq, block_npq);
  }
};

/// y * scale + shift, rounded once. Forward and backward must agree bit for bit on which side of
/// zero it lies, so both come here.
__device__ inline float affine(float y, float scale, float shift) {
  return __fmaf_rn(y, scale, shift);
}

/// max(value, 0), NaN kept.
__device__ inline float relu(float value) { return value < 0.0f ? 0.0f : value; }

/// value where gate > 0 or gate is NaN, else 0: torch's threshold_backward.
__device__ inline float where_active(float gate, float value) {
  return gate <= 0.0f ? 0.0f : value;
}

// ---- Elementwise

struct NoResidual {
  template <class T, int WIDTH>
  struct Rows {
    struct Loaded {};
    __device__ Rows(const NoResidual&, int64_t) {}
    __device__ Loaded load(int64_t) const { return {}; }
    __device__ float add(float value, const Loaded&, int) const { return value; }
  };
};

template <class T>
struct PlainResidual {
  const T* residual;

  template <class, int WIDTH>
  struct Rows {
    using Loaded = Pack<T, WIDTH>;
    const T* residual;
    __device__ Rows(const PlainResidual& operand, int64_t) : residual(operand.residual) {}
    __device__ Loaded load(int64_t offset) const { return load_pack<WIDTH>(residual + offset); }
    __device__ float add(float value, const Loaded& r, int i) const {
      return value + load_float(r.value[i]);
    }
  };
};

template <class T>
struct AffineResidual {
  const T* residual;
  const float* rscale;
  const float* rshift;

  template <class, int WIDTH>
  struct Rows {
    using Loaded = Pack<T, WIDTH>;
    const T* residual;
    Channels<WIDTH> rscale, rshift;
    __device__ Rows(const AffineResidual& operand, int64_t channel)
        : residual(operand.residual),
          rscale(operand.rscale, channel),
          rshift(operand.rshift, channel) {}
    __device__ Loaded load(int64_t offset) const { return load_pack<WIDTH>(residual + offset); }
    __device__ float add(float value, const Loaded& r, int i) const {
      return value + affine(load_float(r.value[i]), rscale[i], rshift[i]);
    }
  };
};

template <class T, int WIDTH, class Residual>
struct AffineActRows {
  const T* y;
  T* z;
  bool with_relu;
  Channels<WIDTH> scale, shift;
  typename Residual::template Rows<T, WIDTH> residual;

  struct Loaded {
    Pack<T, WIDTH> y;
    typename Residual::template Rows<T, WIDTH>::Loaded residual;
  };

  __device__ Loaded load(int64_t offset) const {
    return {load_pack<WIDTH>(y + offset), residual.load(offset)};
  }

  __device__ void operator()(int64_t offset, const Loaded& loaded) const {
    Pack<T, WIDTH> out;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      float value = affine(load_float(loaded.y.value[i]), scale[i], shift[i]);
      value = residual.add(value, loaded.residual, i);
      store_float(out.value[i], with_relu ? relu(value) : value);
    }
    store_pack(z + offset, out);
  }
};

// z = act(y * scale + shift [+ residual | + residual * rscale + rshift])
// Shapes    y, residual, z (NPQ, K) channels-last; scale, shift, rscale, rshift (K,) fp32
// Tiles     a block per block_npq rows x lanes * WIDTH channels; a thread keeps its WIDTH channels
// Traffic   reads y, residual, writes z: 3 * NPQ * K * itemsize; no reuse, bandwidth is the limit
// Numerics  fp32 from load to store; one rounding, at the store; relu(NaN) = NaN
// Source    ops.affine_act; docs/bn_act.md
template <class T, int WIDTH, class Residual>
__global__ void __launch_bounds__(THREADS)
    affine_act_kernel(const T* y, const float* scale, const float* shift, Residual residual, T* z,
                      int64_t npq, int64_t k, int64_t block_npq, unsigned channel_blocks,
                      bool with_relu) {
  const Place at = place<WIDTH>(npq, block_npq, channel_blocks);
  if (at.channel >= k) return;
  AffineActRows<T, WIDTH, Residual> rows{
      y, z, with_relu, {scale, at.channel}, {shift, at.channel}, {residual, at.channel}};
  for_each_row<4>(at, k, rows);
}

/// g of a gradient dz that comes without a ReLU: itself.
struct Unmasked {
  template <int WIDTH>
  struct Rows {
    __device__ Rows(const Unmasked&, int64_t) {}
    __device__ float gradient(float, float dz, int) const { return dz; }
  };
};

/// g behind a ReLU whose output was not kept: the mask is recomputed as affine_act computed it.
struct Masked {
  const float* scale;
  const float* shift;

  template <int WIDTH>
  struct Rows {
    Channels<WIDTH> scale, shift;
    __device__ Rows(const Masked& mask, int64_t channel)
        : scale(mask.scale, channel), shift(mask.shift, channel) {}
    __device__ float gradient(float y, float dz, int i) const {
      return where_active(affine(y, scale[i], shift[i]), dz);
    }
  };
};

template <class T, int WIDTH>
struct TwoPacks {
  Pack<T, WIDTH> dz, y;
};

template <class T, int WIDTH, class Mask>
struct BnBackwardApplyRows {
  const T* dz;
  const T* y;
  T* dy;
  Channels<WIDTH> mean, a, b, c;
  typename Mask::template Rows<WIDTH> mask;

  __device__ TwoPacks<T, WIDTH> load(int64_t offset) const {
    return {load_pack<WIDTH>(dz + offset), load_pack<WIDTH>(y + offset)};
  }

  __device__ void operator()(int64_t offset, const TwoPacks<T, WIDTH>& loaded) const {
    Pack<T, WIDTH> out;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float value = load_float(loaded.y.value[i]);
      const float g = mask.gradient(value, load_float(loaded.dz.value[i]), i);
      store_float(out.value[i], __fmaf_rn(a[i], g, __fmaf_rn(b[i], value - mean[i], c[i])));
    }
    store_pack(dy + offset, out);
  }
};

// dy = a * g + b * (y - mean) + c;  g = dz where y * scale + shift > 0 else 0
// Shapes    dz, y, dy (NPQ, K) channels-last; mean, a, b, c, scale, shift (K,) fp32
// Tiles     as affine_act
// Traffic   reads dz, y, writes dy: 3 * NPQ * K * itemsize; no reuse, bandwidth is the limit
// Numerics  fp32 from load to store; one rounding, at the store
// Source    ops.bn_backward_apply; docs/bn_act.md
template <class T, int WIDTH, class Mask>
__global__ void __launch_bounds__(THREADS)
    bn_backward_apply_kernel(const T* dz, const T* y, const float* mean, const float* a,
                             const float* b, const float* c, Mask mask, T* dy, int64_t npq,
                             int64_t k, int64_t block_npq, unsigned channel_blocks) {
  const Place at = place<WIDTH>(npq, block_npq, channel_blocks);
  if (at.channel >= k) return;
  BnBackwardApplyRows<T, WIDTH, Mask> rows{dz,
                                           y,
                                           dy,
                                           {mean, at.channel},
                                           {a, at.channel},
                                           {b, at.channel},
                                           {c, at.channel},
                                           {mask, at.channel}};
  for_each_row<4>(at, k, rows);
}

// ---- Reductions, stage 1: row blocks into the workspace

/// `mean` less what lies below 2^-13 of `largest`, or 0 if that is not finite. In sums of y - pivot
/// a pivot of many bits would be rounded the same way at every addition, where y itself has few.
__device__ inline float coarse(float mean, float largest) {
  const float anchor = 1024 * largest;
  const float pivot = __fadd_rn(__fadd_rn(mean, anchor), -anchor);
  return pivot - pivot == 0 ? pivot : 0.0f;
}

/// Sums of y - pivot and of its square over a thread's rows, which come in batches of BATCH.
template <class T, int WIDTH, int BATCH>
struct Moments {
  float pivot[WIDTH] = {};
  float residue[WIDTH] = {};
  float square[WIDTH] = {};
  float n = 0;

  /// Any pivot is right; one within a few std of the mean is also accurate: the first rows' mean.
  __device__ void choose_pivot(const Pack<T, WIDTH> (&batch)[BATCH], int rows) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      float sum = 0, largest = 0;
#pragma unroll
      for (int r = 0; r < BATCH; ++r) {
        const float value = r < rows ? load_float(batch[r].value[i]) : 0.0f;
        sum += value;
        largest = fmaxf(largest, fabsf(value));
      }
      pivot[i] = coarse(sum / static_cast<float>(rows), largest);
    }
  }

  __device__ void add(const Pack<T, WIDTH> (&batch)[BATCH], int rows) {
    if (n == 0) choose_pivot(batch, rows);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
      for (int r = 0; r < BATCH; ++r) {
        const float d = r < rows ? load_float(batch[r].value[i]) - pivot[i] : 0.0f;
        residue[i] += d;
        square[i] = __fmaf_rn(d, d, square[i]);
      }
    }
    n += static_cast<float>(rows);
  }
};

// mean = sum(y) / NPQ;  var = sum((y - mean)^2) / NPQ: per row block the mean, what rounding took
// from it (the residue, n times that), and M2
// Shapes    y (NPQ, K) channels-last; workspace (3, row blocks, K) fp32: mean, residue, M2
// Tiles     a block per block_npq rows x lanes * WIDTH channels
// Traffic   reads y: NPQ * K * itemsize, once
// Numerics  fp32 sums of y - pivot and of its square, a pivot per thread and near the mean; threads
//           of a block, and then (in double) blocks are merged by Chan's formula in a fixed order
//           (Chan, Golub, LeVeque 1979): var is good to 4 eps at |mean| / std = 1000
// Source    ops.bn_stats; docs/bn_act.md
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    bn_stats_kernel(const T* y, float* workspace, int64_t npq, int64_t k, int64_t block_npq,
                    int64_t row_blocks, unsigned channel_blocks) {
  constexpr int BATCH = 8;
  const Place at = place<WIDTH>(npq, block_npq, channel_blocks);
  const bool inside = at.channel < k;
  const int64_t step = blockDim.y;
  Moments<T, WIDTH, BATCH> own;
  for (int64_t row = at.first_row; inside && row < at.last_row; row += BATCH * step) {
    Pack<T, WIDTH> batch[BATCH];
    int rows = 0;
#pragma unroll
    for (int r = 0; r < BATCH; ++r) {
      if (row + r * step < at.last_row) {
        batch[r] = load_pack<WIDTH>(y + (row + r * step) * k + at.channel);
        rows = r + 1;
      }
    }
    own.add(batch, rows);
  }

  const float n = static_cast<float>(at.last_row - at.row_block * block_npq);
  float mean[WIDTH], residue[WIDTH], m2[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) mean[i] = __fmaf_rn(own.n, own.pivot[i], own.residue[i]);
  sum_rows(mean);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    mean[i] /= n;
    residue[i] = m2[i] = 0;
    if (own.n > 0) {
      const float r = own.residue[i];
      residue[i] = __fmaf_rn(own.n, own.pivot[i] - mean[i], r);
      m2[i] = own.square[i] - r * r / own.n + residue[i] * residue[i] / own.n;
    }
  }
  sum_rows(residue);
  sum_rows(m2);

  if (inside && threadIdx.y == 0) {
    const int64_t plane = row_blocks * k;
    float* out = workspace + at.row_block * k + at.channel;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float r = residue[i] == residue[i] ? residue[i] : 0.0f;  // an infinite mean stays so
      out[i] = mean[i];
      out[plane + i] = r;
      out[2 * plane + i] = m2[i] - r * r / n;
    }
  }
}

/// The end of stage 1 of a sum: the threads of a block together, then to the workspace.
template <int SUMS, int WIDTH>
__device__ inline void finish_block(float (&sums)[SUMS][WIDTH], const Place& at, int64_t k,
                                    int64_t row_blocks, float* workspace) {
#pragma unroll
  for (int s = 0; s < SUMS; ++s) {
    sum_rows(sums[s]);
    if (at.channel < k && threadIdx.y == 0) {
      float* out = workspace + (s * row_blocks + at.row_block) * k + at.channel;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) out[i] = sums[s][i];
    }
  }
}

template <class T, int WIDTH, int SUMS>
struct AffineActBackwardRows {
  const T* dz;
  const T* z;
  const T* y;
  const T* ry;
  T* g;
  Channels<WIDTH> mean, rmean;
  float (&sums)[SUMS][WIDTH];

  struct Loaded {
    Pack<T, WIDTH> dz, z, y, ry;
  };

  __device__ Loaded load(int64_t offset) const {
    Loaded loaded;
    loaded.dz = load_pack<WIDTH>(dz + offset);
    loaded.z = load_pack<WIDTH>(z + offset);
    loaded.y = load_pack<WIDTH>(y + offset);
    if constexpr (SUMS == 3) loaded.ry = load_pack<WIDTH>(ry + offset);
    return loaded;
  }

  __device__ void operator()(int64_t offset, const Loaded& loaded) {
    Pack<T, WIDTH> out;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float gradient =
          where_active(load_float(loaded.z.value[i]), load_float(loaded.dz.value[i]));
      sums[0][i] += gradient;
      sums[1][i] = __fmaf_rn(gradient, load_float(loaded.y.value[i]) - mean[i], sums[1][i]);
      if constexpr (SUMS == 3) {
        const float rcentred = load_float(loaded.ry.value[i]) - rmean[i];
        sums[2][i] = __fmaf_rn(gradient, rcentred, sums[2][i]);
      }
      store_float(out.value[i], gradient);
    }
    store_pack(g + offset, out);
  }
};

// g = dz where z > 0 else 0;  sum_g = sum(g);  sum_gy = sum(g * (y - mean));  sum_gry likewise
// Shapes    dz, z, y, ry, g (NPQ, K) channels-last; mean, rmean (K,) fp32;
//           workspace (SUMS, row blocks, K) fp32
// Tiles     as bn_stats
// Traffic   reads dz, z, y, ry, writes g: 5 * NPQ * K * itemsize (4 without ry)
// Numerics  fp32 sums over a block, blocks merged in double, in order; g is dz or 0, exactly
// Source    ops.affine_act_backward; docs/bn_act.md
template <class T, int WIDTH, int SUMS>
__global__ void __launch_bounds__(THREADS)
    affine_act_backward_kernel(const T* dz, const T* z, const T* y, const float* mean, const T* ry,
                               const float* rmean, T* g, float* workspace, int64_t npq, int64_t k,
                               int64_t block_npq, int64_t row_blocks, unsigned channel_blocks) {
  const Place at = place<WIDTH>(npq, block_npq, channel_blocks);
  float sums[SUMS][WIDTH] = {};
  if (at.channel < k) {
    AffineActBackwardRows<T, WIDTH, SUMS> rows{
        dz, z, y, ry, g, {mean, at.channel}, {SUMS == 3 ? rmean : mean, at.channel}, sums};
    for_each_row<2>(at, k, rows);
  }
  finish_block(sums, at, k, row_blocks, workspace);
}

template <class T, int WIDTH, class Mask>
struct BnBackwardSumsRows {
  const T* dz;
  const T* y;
  Channels<WIDTH> mean;
  typename Mask::template Rows<WIDTH> mask;
  float (&sums)[2][WIDTH];

  __device__ TwoPacks<T, WIDTH> load(int64_t offset) const {
    return {load_pack<WIDTH>(dz + offset), load_pack<WIDTH>(y + offset)};
  }

  __device__ void operator()(int64_t, const TwoPacks<T, WIDTH>& loaded) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float value = load_float(loaded.y.value[i]);
      const float g = mask.gradient(value, load_float(loaded.dz.value[i]), i);
      sums[0][i] += g;
      sums[1][i] = __fmaf_rn(g, value - mean[i], sums[1][i]);
    }
  }
};

// sum_g = sum(g);  sum_gy = sum(g * (y - mean));  g = dz where y * scale + shift > 0 else 0
// Shapes    dz, y (NPQ, K) channels-last; mean, scale, shift (K,) fp32;
//           workspace (2, row blocks, K) fp32
// Tiles     as bn_stats
// Traffic   reads dz, y: 2 * NPQ * K * itemsize
// Numerics  fp32 sums over a block, blocks merged in double, in order
// Source    ops.bn_backward_sums; docs/bn_act.md
template <class T, int WIDTH, class Mask>
__global__ void __launch_bounds__(THREADS)
    bn_backward_sums_kernel(const T* dz, const T* y, const float* mean, Mask mask, float* workspace,
                            int64_t npq, int64_t k, int64_t block_npq, int64_t row_blocks,
                            unsigned channel_blocks) {
  const Place at = place<WIDTH>(npq, block_npq, channel_blocks);
  float sums[2][WIDTH] = {};
  if (at.channel < k) {
    BnBackwardSumsRows<T, WIDTH, Mask> rows{dz, y, {mean, at.channel}, {mask, at.channel}, sums};
    for_each_row<4>(at, k, rows);
  }
  finish_block(sums, at, k, row_blocks, workspace);
}

// ---- Reductions, stage 2: the row blocks in order

/// Sums term(row block) over the row blocks, FINISH_ROWS threads to a channel, in double and in a
/// fixed order. All threads of the block must call it; each gets its channel's sum.
template <class Term>
__device__ inline double sum_blocks(int64_t row_blocks, bool inside, Term term) {
  __shared__ double shared[FINISH_ROWS][FINISH_CHANNELS];
  double sum = 0;
  for (int64_t b = threadIdx.y; inside && b < row_blocks; b += FINISH_ROWS) sum += term(b);
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int rows = FINISH_ROWS / 2; rows > 0; rows /= 2) {
    if (threadIdx.y < rows) {
      shared[threadIdx.y][threadIdx.x] += shared[threadIdx.y + rows][threadIdx.x];
    }
    __syncthreads();
  }
  sum = shared[0][threadIdx.x];
  __syncthreads();  // the next call writes here again
  return sum;
}

// mean, var from the mean, residue and M2 of each row block
// Shapes    workspace (3, row blocks, K) fp32; mean, var (K,) fp32
// Tiles     a block per FINISH_CHANNELS channels
// Traffic   reads the workspace, mostly from L2
// Numerics  double; var clamped at 0, NaN kept
// Source    ops.bn_stats; docs/bn_act.md
__global__ void __launch_bounds__(FINISH_ROWS* FINISH_CHANNELS)
    finish_stats_kernel(const float* workspace, float* mean, float* var, int64_t npq, int64_t k,
                        int64_t block_npq, int64_t row_blocks) {
  const int64_t channel = int64_t{blockIdx.x} * FINISH_CHANNELS + threadIdx.x;
  const bool inside = channel < k;
  const float* means = workspace + channel;
  const float* residues = means + row_blocks * k;
  const float* m2s = residues + row_blocks * k;
  const double count = static_cast<double>(npq > 0 ? npq : 1);
  const auto rows = [=](int64_t b) {
    return static_cast<double>(smaller(block_npq, npq - b * block_npq));
  };

  const double sum = sum_blocks(
      row_blocks, inside, [=](int64_t b) { return rows(b) * means[b * k] + residues[b * k]; });
  const double average = sum / count;
  const double m2 = sum_blocks(row_blocks, inside, [=](int64_t b) {
    const double d = means[b * k] - average + residues[b * k] / rows(b);
    return m2s[b * k] + d * d * rows(b);
  });
  if (inside && threadIdx.y == 0) {
    mean[channel] = static_cast<float>(average);
    var[channel] = m2 < 0 ? 0.0f : static_cast<float>(m2 / count);
  }
}

/// Up to three outputs, of which the first SUMS are used.
struct Outputs {
  float* sum[3];
};

// sum[s] = the sum of each row block's sum
// Shapes    workspace (SUMS, row blocks, K) fp32; sum[s] (K,) fp32
// Tiles     a block per FINISH_CHANNELS channels and sum: grid (cdiv(K, FINISH_CHANNELS), SUMS)
// Traffic   reads the workspace, mostly from L2
// Numerics  double
// Source    ops.affine_act_backward, ops.bn_backward_sums; docs/bn_act.md
__global__ void __launch_bounds__(FINISH_ROWS* FINISH_CHANNELS)
    finish_sums_kernel(const float* workspace, Outputs out, int64_t k, int64_t row_blocks) {
  const int64_t channel = int64_t{blockIdx.x} * FINISH_CHANNELS + threadIdx.x;
  const float* partial = workspace + blockIdx.y * row_blocks * k + channel;
  const double sum = sum_blocks(row_blocks, channel < k,
                                [=](int64_t b) { return static_cast<double>(partial[b * k]); });
  if (channel < k && threadIdx.y == 0) out.sum[blockIdx.y][channel] = static_cast<float>(sum);
}

// ---- Launches

/// Calls f(width) with the channels a thread moves at once: WIDE<T> as a constant if allowed, or 1.
template <class T, class F>
void visit_width(bool wide, F f) {
  if (wide) {
    f(std::integral_constant<int, WIDE<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

/// Calls f(mask) with the mask functor that the arguments ask for.
template <class Args, class F>
void visit_mask(const Args& args, F f) {
  if (args.scale) {
    f(Masked{args.scale, args.shift});
  } else {
    f(Unmasked{});
  }
}

/// Rows of an elementwise block: whole batches of 4 a thread, in few enough blocks.
int64_t elementwise_rows(int64_t npq, const Layout& layout) {
  const int64_t batch = int64_t{layout.rows()} * 4;
  const int64_t blocks = cdiv(ELEMENTWISE_BLOCKS, layout.channel_blocks);
  return cdiv(cdiv(npq, blocks), batch) * batch;
}

void finish_sums(int sums, const float* workspace, Outputs out, int64_t k, int64_t row_blocks,
                 Stream stream) {
  const dim3 grid(static_cast<unsigned>(cdiv(k, FINISH_CHANNELS)), sums);
  const dim3 block(FINISH_CHANNELS, FINISH_ROWS);
  launch(finish_sums_kernel, grid, block, 0, stream, workspace, out, k, row_blocks);
}

template <class T, class Residual>
void launch_affine_act(const AffineAct& args, Residual residual) {
  const T* y = static_cast<const T*>(args.y);
  T* z = static_cast<T*>(args.z);
  visit_width<T>(aligned(args.k, args.y, args.residual, args.z), [&](auto width) {
    const Layout layout(args.k, width);
    const int64_t block_npq = elementwise_rows(args.npq, layout);
    launch(affine_act_kernel<T, width(), Residual>, layout.grid(cdiv(args.npq, block_npq)),
           layout.block(), 0, args.stream, y, args.scale, args.shift, residual, z, args.npq, args.k,
           block_npq, layout.channel_blocks, args.relu);
  });
}

template <int SUMS, class T>
void launch_affine_act_backward(const AffineActBackward& args) {
  const RowBlocks blocks(args.npq, args.k);
  if (args.npq > 0) {
    const bool wide = aligned(args.k, args.dz, args.z, args.y, args.ry, args.g);
    visit_width<T>(wide, [&](auto width) {
      const Layout layout(args.k, width);
      launch(affine_act_backward_kernel<T, width(), SUMS>, layout.grid(blocks.count),
             layout.block(), 0, args.stream, static_cast<const T*>(args.dz),
             static_cast<const T*>(args.z), static_cast<const T*>(args.y), args.mean,
             static_cast<const T*>(args.ry), args.rmean, static_cast<T*>(args.g), args.workspace,
             args.npq, args.k, blocks.block_npq, blocks.count, layout.channel_blocks);
    });
  }
  finish_sums(SUMS, args.workspace, {{args.sum_g, args.sum_gy, args.sum_gry}}, args.k, blocks.count,
              args.stream);
}

}  // namespace

int64_t bn_workspace(int64_t npq, int64_t k) { return 3 * RowBlocks(npq, k).count * k; }

void bn_stats(const BnStats& args) {
  const RowBlocks blocks(args.npq, args.k);
  if (args.npq > 0) {
    visit_device(args.dtype, [&](auto type) {
      using T = decltype(type);
      visit_width<T>(aligned(args.k, args.y), [&](auto width) {
        const Layout layout(args.k, width);
        launch(bn_stats_kernel<T, width()>, layout.grid(blocks.count), layout.block(), 0,
               args.stream, static_cast<const T*>(args.y), args.workspace, args.npq, args.k,
               blocks.block_npq, blocks.count, layout.channel_blocks);
      });
    });
  }
  launch(finish_stats_kernel, dim3(static_cast<unsigned>(cdiv(args.k, FINISH_CHANNELS))),
         dim3(FINISH_CHANNELS, FINISH_ROWS), 0, args.stream, args.workspace, args.mean, args.var,
         args.npq, args.k, blocks.block_npq, blocks.count);
}

void affine_act(const AffineAct& args) {
  if (args.npq == 0) return;
  visit_device(args.dtype, [&](auto type) {
    using T = decltype(type);
    const T* residual = static_cast<const T*>(args.residual);
    if (!residual) {
      launch_affine_act<T>(args, NoResidual{});
    } else if (!args.rscale) {
      launch_affine_act<T>(args, PlainResidual<T>{residual});
    } else {
      launch_affine_act<T>(args, AffineResidual<T>{residual, args.rscale, args.rshift});
    }
  });
}

void affine_act_backward(const AffineActBackward& args) {
  visit_device(args.dtype, [&](auto type) {
    using T = decltype(type);
    // An empty tensor's address may be 0: with no rows, sum_gry alone says that there is an ry.
    if (args.ry || (args.sum_gry && args.npq == 0)) {
      launch_affine_act_backward<3, T>(args);
    } else {
      launch_affine_act_backward<2, T>(args);
    }
  });
}

void bn_backward_sums(const BnBackwardSums& args) {
  const RowBlocks blocks(args.npq, args.k);
  if (args.npq > 0) {
    visit_device(args.dtype, [&](auto type) {
      using T = decltype(type);
      visit_width<T>(aligned(args.k, args.dz, args.y), [&](auto width) {
        visit_mask(args, [&](auto mask) {
          const Layout layout(args.k, width);
          launch(bn_backward_sums_kernel<T, width(), decltype(mask)>, layout.grid(blocks.count),
                 layout.block(), 0, args.stream, static_cast<const T*>(args.dz),
                 static_cast<const T*>(args.y), args.mean, mask, args.workspace, args.npq, args.k,
                 blocks.block_npq, blocks.count, layout.channel_blocks);
        });
      });
    });
  }
  finish_sums(2, args.workspace, {{args.sum_g, args.sum_gy, nullptr}}, args.k, blocks.count,
              args.stream);
}

void bn_backward_apply(const BnBackwardApply& args) {
  if (args.npq == 0) return;
  visit_device(args.dtype, [&](auto type) {
    using T = decltype(type);
    visit_width<T>(aligned(args.k, args.dz, args.y, args.dy), [&](auto width) {
      visit_mask(args, [&](auto mask) {
        const Layout layout(args.k, width);
        const int64_t block_npq = elementwise_rows(args.npq, layout);
        launch(bn_backward_apply_kernel<T, width(), decltype(mask)>,
               layout.grid(cdiv(args.npq, block_npq)), layout.block(), 0, args.stream,
               static_cast<const T*>(args.dz), static_cast<const T*>(args.y), args.mean, args.a,
               args.b, args.c, mask, static_cast<T*>(args.dy), args.npq, args.k, block_npq,
               layout.channel_blocks);
      });
    });
  });
}

}  // namespace resnet_fast::cuda
