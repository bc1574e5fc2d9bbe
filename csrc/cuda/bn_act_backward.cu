// The backward of BatchNorm, ReLU and residual add: the twin of cpu/bn_act_backward.cpp. Arithmetic
// is fp32 whatever the storage. Not yet run on a GPU.
#include "reduce.cuh"

namespace resnet_fast::cuda {
namespace {

// ---- At a block's end: g, and the sums of it

/// Where the ReLU let z pass, from z itself.
template <class T>
struct GateOfOutput {
  const T* z;

  template <int WIDTH>
  struct Rows {
    using Loaded = Pack<T, WIDTH>;
    const T* z;
    __device__ Rows(const GateOfOutput& gate, int64_t, int64_t) : z(gate.z) {}
    __device__ Loaded load(int64_t, int64_t offset) const { return load_pack<WIDTH>(z + offset); }
    __device__ static bool open(const Loaded& z, int i) { return passes(load_float(z.value[i])); }
  };
};

/// The same from the mask that affine_act wrote, a bit for each channel.
struct GateOfMask {
  const uint8_t* mask;

  template <int WIDTH>
  struct Rows {
    using Loaded = unsigned;
    const uint8_t* mask;  // the thread's byte of row 0
    int64_t pitch;
    int first_bit;
    __device__ Rows(const GateOfMask& gate, int64_t k, int64_t channel)
        : mask(gate.mask + channel / 8),
          pitch(cdiv(k, 8)),
          first_bit(static_cast<int>(channel % 8)) {}
    __device__ Loaded load(int64_t row, int64_t) const { return mask[row * pitch] >> first_bit; }
    __device__ static bool open(Loaded bits, int i) { return bits >> i & 1; }
  };
};

template <class T, int WIDTH, int SUMS, class Gate>
struct AffineActBackwardRows {
  const T* dz;
  const T* y;
  const T* ry;
  T* g;
  typename Gate::template Rows<WIDTH> gate;
  Channels<WIDTH> mean, rmean;
  float (&sums)[SUMS][WIDTH];

  struct Loaded {
    typename Gate::template Rows<WIDTH>::Loaded gate;
    Pack<T, WIDTH> dz, y, ry;
  };

  __device__ Loaded load(int64_t row, int64_t offset) const {
    Loaded loaded;
    loaded.gate = gate.load(row, offset);
    loaded.dz = load_pack<WIDTH>(dz + offset);
    loaded.y = load_pack<WIDTH>(y + offset);
    if constexpr (SUMS == 3) loaded.ry = load_pack<WIDTH>(ry + offset);
    return loaded;
  }

  __device__ void operator()(int64_t, int64_t offset, const Loaded& loaded) {
    Pack<T, WIDTH> out;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float gradient = gate.open(loaded.gate, i) ? load_float(loaded.dz.value[i]) : 0.0f;
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
// Shapes    dz, z, y, ry, g (NPQ, K) channels-last; in the place of z its mask (NPQ, cdiv(K, 8))
//           bytes; mean, rmean (K,) fp32; workspace (SUMS, row blocks, K) fp32
// Tiles     as bn_stats
// Traffic   reads dz, z, y, ry, writes g: 5 * NPQ * K * itemsize (4 without ry); the mask in the
//           place of z saves all but 1 / (8 * itemsize) of one
// Numerics  fp32 sums over a block, blocks merged in double, in order; g is dz or 0, exactly
// Source    ops.affine_act_backward; docs/bn_act.md
template <class T, int WIDTH, int SUMS, class Gate>
__global__ void __launch_bounds__(THREADS)
    affine_act_backward_kernel(const T* dz, Gate gate, const T* y, const float* mean, const T* ry,
                               const float* rmean, T* g, float* workspace, int64_t npq, int64_t k,
                               int64_t block_npq, int64_t row_blocks, unsigned channel_blocks) {
  const Place at = place<WIDTH>(npq, block_npq, channel_blocks);
  float sums[SUMS][WIDTH] = {};
  if (at.channel < k) {
    AffineActBackwardRows<T, WIDTH, SUMS, Gate> rows{dz,
                                                     y,
                                                     ry,
                                                     g,
                                                     {gate, k, at.channel},
                                                     {mean, at.channel},
                                                     {SUMS == 3 ? rmean : mean, at.channel},
                                                     sums};
    for_each_row<2>(at, k, rows);
  }
  finish_block(sums, at, k, row_blocks, workspace);
}

// ---- Inside a block: the ReLU's mask is formed again from y

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
      return passes(affine(y, scale[i], shift[i])) ? dz : 0.0f;
    }
  };
};

template <class T, int WIDTH>
struct TwoPacks {
  Pack<T, WIDTH> dz, y;
};

template <class T, int WIDTH, class Mask>
struct BnBackwardSumsRows {
  const T* dz;
  const T* y;
  Channels<WIDTH> mean;
  typename Mask::template Rows<WIDTH> mask;
  float (&sums)[2][WIDTH];

  __device__ TwoPacks<T, WIDTH> load(int64_t, int64_t offset) const {
    return {load_pack<WIDTH>(dz + offset), load_pack<WIDTH>(y + offset)};
  }

  __device__ void operator()(int64_t, int64_t, const TwoPacks<T, WIDTH>& loaded) {
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

template <class T, int WIDTH, class Mask>
struct BnBackwardApplyRows {
  const T* dz;
  const T* y;
  T* dy;
  Channels<WIDTH> mean, a, b, c;
  typename Mask::template Rows<WIDTH> mask;

  __device__ TwoPacks<T, WIDTH> load(int64_t, int64_t offset) const {
    return {load_pack<WIDTH>(dz + offset), load_pack<WIDTH>(y + offset)};
  }

  __device__ void operator()(int64_t, int64_t offset, const TwoPacks<T, WIDTH>& loaded) const {
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

// b = -scale * rstd^2 * sum_gy / n;  c = -scale * sum_g / n;  dgamma = rstd * sum_gy
// Shapes    all (K,) fp32
// Tiles     a thread per channel
// Traffic   reads 4, writes 3 * K * 4 bytes: latency is the limit
// Numerics  double; one rounding, at the store
// Source    ops.bn_backward_finalize; docs/bn_act.md
__global__ void __launch_bounds__(THREADS)
    bn_backward_finalize_kernel(const float* sum_g, const float* sum_gy, const float* rstd,
                                const float* scale, float* b, float* c, float* dgamma, double share,
                                int64_t k) {
  const int64_t channel = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (channel >= k) return;
  const double r = rstd[channel], gy = sum_gy[channel], a = -share * scale[channel];
  b[channel] = static_cast<float>(a * r * r * gy);
  c[channel] = static_cast<float>(a * sum_g[channel]);
  dgamma[channel] = static_cast<float>(r * gy);
}

// ---- Launches

/// Calls f(mask) with the mask functor that the arguments ask for.
template <class Args, class F>
void visit_mask(const Args& args, F f) {
  if (args.scale) {
    f(Masked{args.scale, args.shift});
  } else {
    f(Unmasked{});
  }
}

/// Calls f(gate) likewise.
template <class T, class F>
void visit_gate(const AffineActBackward& args, F f) {
  if (args.mask) {
    f(GateOfMask{args.mask});
  } else {
    f(GateOfOutput<T>{static_cast<const T*>(args.z)});
  }
}

template <int SUMS, class T>
void launch_affine_act_backward(const AffineActBackward& args) {
  const RowBlocks blocks(args.npq, args.k);
  if (args.npq > 0) {
    const bool wide = aligned(args.k, args.dz, args.z, args.y, args.ry, args.g);
    visit_width<T>(wide, [&](auto width) {
      visit_gate<T>(args, [&](auto gate) {
        const Layout layout(args.k, width);
        launch(affine_act_backward_kernel<T, width(), SUMS, decltype(gate)>,
               layout.grid(blocks.count), layout.block(), 0, args.stream,
               static_cast<const T*>(args.dz), gate, static_cast<const T*>(args.y), args.mean,
               static_cast<const T*>(args.ry), args.rmean, static_cast<T*>(args.g), args.workspace,
               args.npq, args.k, blocks.block_npq, blocks.count, layout.channel_blocks);
      });
    });
  }
  finish_sums(SUMS, args.workspace, {{args.sum_g, args.sum_gy, args.sum_gry}}, args.k, blocks.count,
              args.stream);
}

}  // namespace

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

void bn_backward_finalize(const BnBackwardFinalize& args) {
  const double share = args.n > 0 ? 1 / args.n : 0;
  launch(bn_backward_finalize_kernel, dim3(static_cast<unsigned>(cdiv(args.k, THREADS))),
         dim3(THREADS), 0, args.stream, args.sum_g, args.sum_gy, args.rstd, args.scale, args.b,
         args.c, args.dgamma, share, args.k);
}

void bn_backward_apply(const BnBackwardApply& args) {
  if (args.npq == 0) return;
  visit_device(args.dtype, [&](auto type) {
    using T = decltype(type);
    visit_width<T>(aligned(args.k, args.dz, args.y, args.dy), [&](auto width) {
      visit_mask(args, [&](auto mask) {
        const Layout layout(args.k, width);
        const int64_t block_npq = elementwise_rows(args.npq, layout, 4);
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
