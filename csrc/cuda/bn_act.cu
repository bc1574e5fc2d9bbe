// BatchNorm, ReLU and residual add around a convolution: the twin of cpu/bn_act.cpp, whose backward
// is in bn_act_backward.cu. Arithmetic is fp32 whatever the storage.
// Not yet run on a GPU.
#include "reduce.cuh"

namespace resnet_fast::cuda {
namespace {

// ---- Statistics, stage 1: row blocks into the workspace

/// `mean` less what lies below 2^-13 of `largest`, or 0 if that is not finite. In sums of y - pivot
/// a pivot of many bits would be rounded the same way at every addition, where y itself has few.
__device__ inline float coarse(float mean, float largest) {
  const float anchor = 1024 * largest;
  const float pivot = __fadd_rn(__fadd_rn(mean, anchor), -anchor);
  return pivot - pivot == 0 ? pivot : 0.0f;
}

/// Neighbouring rows of a thread, as far as there are any.
template <class T, int WIDTH>
struct Batch {
  Pack<T, WIDTH> row[REDUCE_BATCH];
  int rows = 0;

  __device__ Batch(const T* y, const Place& at, int64_t first_row, int64_t k) {
    const int64_t step = blockDim.y;
#pragma unroll
    for (int r = 0; r < REDUCE_BATCH; ++r) {
      if (first_row + r * step < at.last_row) {
        row[r] = load_pack<WIDTH>(y + (first_row + r * step) * k + at.channel);
        rows = r + 1;
      }
    }
  }
};

/// Sums of y - pivot and of its square over a thread's rows.
template <class T, int WIDTH>
struct Moments {
  float pivot[WIDTH] = {};
  float residue[WIDTH] = {};
  float square[WIDTH] = {};
  float n = 0;

  /// Any pivot is right; one within a few std of the mean is also accurate: the first rows' mean.
  __device__ void choose_pivot(const Batch<T, WIDTH>& batch) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      float sum = 0, largest = 0;
#pragma unroll
      for (int r = 0; r < REDUCE_BATCH; ++r) {
        const float value = r < batch.rows ? load_float(batch.row[r].value[i]) : 0.0f;
        sum += value;
        largest = fmaxf(largest, fabsf(value));
      }
      pivot[i] = coarse(sum / static_cast<float>(batch.rows), largest);
    }
  }

  __device__ void add(const Batch<T, WIDTH>& batch) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
      for (int r = 0; r < REDUCE_BATCH; ++r) {
        const float d = r < batch.rows ? load_float(batch.row[r].value[i]) - pivot[i] : 0.0f;
        residue[i] += d;
        square[i] = __fmaf_rn(d, d, square[i]);
      }
    }
    n += static_cast<float>(batch.rows);
  }
};

// mean = sum(y) / NPQ;  M2 = sum((y - mean)^2): per row block the mean, what rounding took from it
// (the residue, n times that), and M2
// Shapes    y (NPQ, K) channels-last; workspace (3, row blocks, K) fp32: mean, residue, M2
// Tiles     a block per block_npq rows x lanes * WIDTH channels
// Traffic   reads y: NPQ * K * itemsize, once from HBM
// Numerics  fp32 sums of y - pivot and of its square, a pivot per thread and near the mean; threads
//           of a block, and then (in double) blocks are merged by Chan's formula in a fixed order
//           (Chan, Golub, LeVeque 1979): var is good to 4 eps at |mean| / std = 1000
// Source    ops.bn_stats; docs/bn_act.md
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    bn_stats_kernel(const T* y, float* workspace, int64_t npq, int64_t k, int64_t block_npq,
                    int64_t row_blocks, unsigned channel_blocks) {
  const Place at = place<WIDTH>(npq, block_npq, channel_blocks);
  const bool inside = at.channel < k;
  Moments<T, WIDTH> own;
  if (inside && at.first_row < at.last_row) {
    // The loop loads these rows again, from L1: holding them would take the registers of a block.
    own.choose_pivot(Batch<T, WIDTH>(y, at, at.first_row, k));
    for (int64_t row = at.first_row; row < at.last_row; row += REDUCE_BATCH * blockDim.y) {
      own.add(Batch<T, WIDTH>(y, at, row, k));
    }
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

// ---- Statistics, stage 2: the parts of a mean, in order

/// The row blocks of bn_stats_kernel.
struct RowBlockParts {
  const float* workspace;
  int64_t npq, k, block_npq, count;

  __device__ double total() const { return static_cast<double>(npq); }
  __device__ double n(int64_t b) const {
    return static_cast<double>(smaller(block_npq, npq - b * block_npq));
  }
  __device__ double sum(int64_t b, int64_t channel) const {
    const float* mean = workspace + b * k + channel;
    return n(b) * mean[0] + mean[count * k];
  }
  /// The sum of (y - average)^2, by Chan's formula.
  __device__ double m2(int64_t b, int64_t channel, double average) const {
    const float* mean = workspace + b * k + channel;
    const double d = mean[0] - average + mean[count * k] / n(b);
    return mean[2 * count * k] + d * d * n(b);
  }
};

/// Parts whose statistics were taken elsewhere: other ranks'. They may be empty.
struct GivenParts {
  const float* size;
  const float* means;
  const float* vars;
  int64_t k, count;

  __device__ double total() const {
    double sum = 0;
    for (int64_t b = 0; b < count; ++b) sum += size[b];
    return sum;
  }
  __device__ double sum(int64_t b, int64_t channel) const {
    return static_cast<double>(size[b]) * means[b * k + channel];
  }
  __device__ double m2(int64_t b, int64_t channel, double average) const {
    const double n = size[b], d = means[b * k + channel] - average;
    return (n > 1 ? n - 1 : 0) * vars[b * k + channel] + d * d * n;
  }
};

/// What bn_stats and bn_finalize give, and what of it is not data.
struct Normalise {
  const float* gamma;
  const float* beta;
  float* mean;
  float* var;
  float* rstd;
  float* scale;
  float* shift;
  float eps;

  template <class Args>
  explicit Normalise(const Args& args)
      : gamma(args.gamma),
        beta(args.beta),
        mean(args.mean),
        var(args.var),
        rstd(args.rstd),
        scale(args.scale),
        shift(args.shift),
        eps(args.eps) {}

  __device__ void store(int64_t channel, double average, double m2, double n) const {
    if (m2 < 0) m2 = 0;  // and NaN stays
    const double r = 1 / sqrt(m2 / (n > 1 ? n : 1) + eps);
    // shift takes the scale that y will meet, the rounded one: then y = mean gives beta.
    const float s = static_cast<float>(gamma ? gamma[channel] * r : r);
    mean[channel] = static_cast<float>(average);
    var[channel] = static_cast<float>(m2 / (n > 2 ? n - 1 : 1));
    rstd[channel] = static_cast<float>(r);
    scale[channel] = s;
    shift[channel] = static_cast<float>((beta ? beta[channel] : 0) - average * s);
  }
};

// mean, var = M2 / max(n - 1, 1), rstd = 1 / sqrt(M2 / n + eps), scale = gamma * rstd,
// shift = beta - mean * scale, from the n, mean and M2 of parts
// Shapes    parts (count, K) fp32: row blocks or ranks; gamma, beta and the outputs (K,) fp32
// Tiles     a block per FINISH_CHANNELS channels; its FINISH_ROWS rows of threads share the parts
// Traffic   reads the parts twice, 2 or 3 * count * K * 4 bytes: from L2, and then from L1
// Numerics  double, merged by Chan's formula about the common mean (Chan, Golub, LeVeque 1979) in a
//           fixed order; one rounding, at the store; M2 clamped at 0, NaN kept
// Source    ops.bn_stats, ops.bn_finalize; docs/bn_act.md
template <class Parts>
__global__ void __launch_bounds__(FINISH_ROWS* FINISH_CHANNELS)
    finish_stats_kernel(Parts parts, Normalise out, int64_t k) {
  const int64_t channel = int64_t{blockIdx.x} * FINISH_CHANNELS + threadIdx.x;
  const bool inside = channel < k;
  const double n = parts.total();
  const double sum =
      sum_blocks(parts.count, inside, [=](int64_t b) { return parts.sum(b, channel); });
  const double average = sum / (n > 1 ? n : 1);
  const double m2 =
      sum_blocks(parts.count, inside, [=](int64_t b) { return parts.m2(b, channel, average); });
  if (inside && threadIdx.y == 0) out.store(channel, average, m2, n);
}

// ---- z = act(y * scale + shift + residual)

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

/// The bits of 8 channels, from the 8 / WIDTH neighbouring threads that have them; each gets all.
template <int WIDTH>
__device__ inline unsigned join_byte(unsigned bits, int64_t channel) {
  constexpr unsigned SHARERS = 8 / WIDTH;
  if constexpr (SHARERS > 1) {
    const unsigned lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
    const unsigned sharers = ((1u << SHARERS) - 1) << (lane / SHARERS * SHARERS);
    bits <<= channel % 8;
#pragma unroll
    for (unsigned step = 1; step < SHARERS; step *= 2) {
      bits |= __shfl_xor_sync(sharers, bits, step);
    }
  }
  return bits;
}

template <class T, int WIDTH, class Residual, bool MASK>
struct AffineActRows {
  const T* y;
  T* z;
  uint8_t* mask;
  int64_t mask_pitch, channel;
  bool inside, with_relu;
  Channels<WIDTH> scale, shift;
  typename Residual::template Rows<T, WIDTH> residual;

  struct Loaded {
    Pack<T, WIDTH> y;
    typename Residual::template Rows<T, WIDTH>::Loaded residual;
  };

  __device__ Loaded load(int64_t, int64_t offset) const {
    return {load_pack<WIDTH>(y + offset), residual.load(offset)};
  }

  __device__ void operator()(int64_t row, int64_t offset, const Loaded& loaded) const {
    Pack<T, WIDTH> out;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      float value = affine(load_float(loaded.y.value[i]), scale[i], shift[i]);
      value = residual.add(value, loaded.residual, i);
      store_float(out.value[i], with_relu ? relu(value) : value);
      if (MASK && inside && passes(load_float(out.value[i]))) bits |= 1u << i;
    }
    if (inside) store_pack(z + offset, out);
    if constexpr (MASK) {
      const unsigned byte = join_byte<WIDTH>(bits, channel);
      if (channel % 8 == 0) mask[row * mask_pitch + channel / 8] = static_cast<uint8_t>(byte);
    }
  }
};

// z = act(y * scale + shift [+ residual | + residual * rscale + rshift]);  mask = z > 0
// Shapes    y, residual, z (NPQ, K) channels-last; scale, shift, rscale, rshift (K,) fp32;
//           mask (NPQ, cdiv(K, 8)) bytes, a bit for each channel
// Tiles     a block per block_npq rows x lanes * WIDTH channels; a thread keeps its WIDTH channels;
//           8 / WIDTH neighbouring threads make a byte of mask
// Traffic   reads y, residual, writes z: 3 * NPQ * K * itemsize, and NPQ * K / 8 of mask; no reuse,
//           bandwidth is the limit
// Numerics  fp32 from load to store; one rounding, at the store; relu(NaN) = NaN; the mask is of z
//           as stored
// Source    ops.affine_act, ops.affine_act_mask; docs/bn_act.md
template <class T, int WIDTH, class Residual, bool MASK>
__global__ void __launch_bounds__(THREADS)
    affine_act_kernel(const T* y, const float* scale, const float* shift, Residual residual, T* z,
                      uint8_t* mask, int64_t npq, int64_t k, int64_t block_npq,
                      unsigned channel_blocks, bool with_relu) {
  Place at = place<WIDTH>(npq, block_npq, channel_blocks);
  const int64_t channel = at.channel;
  const bool inside = channel < k;
  if (MASK ? channel / 8 * 8 >= k : !inside) return;
  if (!inside) at.channel = k - 1;  // takes part in the byte of its neighbours, stores nothing
  AffineActRows<T, WIDTH, Residual, MASK> rows{y,
                                               z,
                                               mask,
                                               cdiv(k, 8),
                                               channel,
                                               inside,
                                               with_relu,
                                               {scale, at.channel},
                                               {shift, at.channel},
                                               {residual, at.channel}};
  for_each_row<4>(at, k, rows);
}

template <class T, class Residual, bool MASK>
void launch_affine_act(const AffineAct& args, Residual residual) {
  visit_width<T>(aligned(args.k, args.y, args.residual, args.z), [&](auto width) {
    const Layout layout(args.k, width, MASK ? 8 / width : 1);
    const int64_t block_npq = elementwise_rows(args.npq, layout, 4);
    launch(affine_act_kernel<T, width(), Residual, MASK>, layout.grid(cdiv(args.npq, block_npq)),
           layout.block(), 0, args.stream, static_cast<const T*>(args.y), args.scale, args.shift,
           residual, static_cast<T*>(args.z), args.mask, args.npq, args.k, block_npq,
           layout.channel_blocks, args.relu);
  });
}

/// Calls f(residual) with the functor that the arguments ask for.
template <class T, class F>
void visit_residual(const AffineAct& args, F f) {
  const T* residual = static_cast<const T*>(args.residual);
  if (!residual) {
    f(NoResidual{});
  } else if (!args.rscale) {
    f(PlainResidual<T>{residual});
  } else {
    f(AffineResidual<T>{residual, args.rscale, args.rshift});
  }
}

}  // namespace

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
  const RowBlockParts parts{args.workspace, args.npq, args.k, blocks.block_npq, blocks.count};
  launch(finish_stats_kernel<RowBlockParts>, finish_grid(args.k), finish_threads(), 0, args.stream,
         parts, Normalise(args), args.k);
}

void bn_finalize(const BnFinalize& args) {
  const GivenParts parts{args.n, args.means, args.vars, args.k, args.parts};
  launch(finish_stats_kernel<GivenParts>, finish_grid(args.k), finish_threads(), 0, args.stream,
         parts, Normalise(args), args.k);
}

void affine_act(const AffineAct& args) {
  if (args.npq == 0) return;
  visit_device(args.dtype, [&](auto type) {
    using T = decltype(type);
    visit_residual<T>(args, [&](auto residual) {
      if (args.mask) {
        launch_affine_act<T, decltype(residual), true>(args, residual);
      } else {
        launch_affine_act<T, decltype(residual), false>(args, residual);
      }
    });
  });
}

}  // namespace resnet_fast::cuda
