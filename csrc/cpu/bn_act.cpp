// BatchNorm, ReLU and residual add behind a convolution, on the CPU; their backward is
// bn_act_backward.cpp.
//
// setup.py compiles this file once per instruction set, each into a namespace of its own; isa.cpp
// picks one. Arithmetic is fp32 whatever the storage.
#include "isa.h"
#include "passes.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Rows whose mean is a tile's pivot.
constexpr int64_t PIVOT_ROWS = 8;

int64_t bn_workspace(int64_t npq, int64_t k) { return 3 * Tiles{npq, k}.row_blocks() * padded(k); }

/// `mean` less what lies below 2^-13 of `size`, or 0 if that is not finite. In sums of y - pivot a
/// pivot of many bits would be rounded the same way at every addition, where y itself has few.
float coarse(float mean, float size) {
  const float anchor = 1024 * size;
  const float pivot = (mean + anchor) - anchor;
  return pivot - pivot == 0 ? pivot : 0;
}

/// What bn_stats and bn_finalize return of the `count` channels from `first` on, from their means
/// and M2s over n values. The loop is of vectors: roots and quotients are what a small y takes.
template <class Args>
void normalise(const Args& args, int64_t first, int64_t count, const double (&mean)[PACK],
               const double (&m2)[PACK], double n) {
  const double biased = n > 1 ? n : 1, unbiased = n > 2 ? n - 1 : 1, eps = args.eps;
  double gamma[PACK], beta[PACK];
  for (int64_t i = 0; i < PACK; ++i) {
    gamma[i] = args.gamma && i < count ? args.gamma[first + i] : 1.0;
    beta[i] = args.beta && i < count ? args.beta[first + i] : 0.0;
  }
  float found[5][PACK];
#pragma omp simd
  for (int64_t i = 0; i < PACK; ++i) {
    const double squares = m2[i] < 0 ? 0 : m2[i];  // keeps NaN
    const double rstd = 1 / __builtin_sqrt(squares / biased + eps);
    const float scale = static_cast<float>(gamma[i] * rstd);
    found[0][i] = static_cast<float>(mean[i]);
    found[1][i] = static_cast<float>(squares / unbiased);
    found[2][i] = static_cast<float>(rstd);
    found[3][i] = scale;
    // Of the scale as it is rounded: y * scale + shift is then beta at any mean.
    found[4][i] = static_cast<float>(beta[i] - mean[i] * scale);
  }
  float* const out[5] = {args.mean, args.var, args.rstd, args.scale, args.shift};
  for (int s = 0; s < 5; ++s) __builtin_memcpy(out[s] + first, found[s], count * sizeof(float));
}

// mean = sum(y) / NPQ;  var = sum((y - mean)^2) / (NPQ - 1);  rstd, scale, shift follow
// Shapes    y (NPQ, K) channels-last; gamma, beta, mean, var, rstd, scale, shift (K,) fp32;
//           workspace (3, row blocks, padded(K)) fp32
// Tiles     BLOCK_NPQ x BLOCK_K; a thread takes a run of them, channel blocks first
// Traffic   reads y: NPQ * K * itemsize, once
// Numerics  per tile, in fp32, sums of y - pivot and of its square, the pivot near the mean; tiles
//           merged in double, in order, by Chan's formula (Chan, Golub, LeVeque 1979): var is good
//           to 4 eps at |mean| / std = 1000
// Source    ops.bn_stats; docs/bn_act.md
template <class T>
void bn_stats_tile(const T* y, const Tile& tile, int64_t k, float* pivot, float* residue,
                   float* m2) {
  // Any pivot is right; one within a few std of the tile's mean is also accurate. The mean of the
  // first rows is at worst sqrt(BLOCK_NPQ / PIVOT_ROWS) std away.
  Tile head = tile;
  head.row_end = smaller(tile.row + PIVOT_ROWS, tile.row_end);
  const auto add_head = [=](const At& at, auto lanes, Vec(&sums)[2][2]) {
    const Pair value = widen(load_ahead(y + at.offset, at.ahead, lanes));
    for (int h = 0; h < 2; ++h) {
      sums[0][h] += value.v[h];
      sums[1][h] += absolute(value.v[h]);
    }
  };
  sum_tile<T, PIVOT_ROWS>(head, k, add_head, {pivot, m2});
  const int64_t count = padded(tile.channel_end - tile.channel);
  const float share = 1 / static_cast<float>(head.row_end - head.row);
  for (int64_t c = 0; c < count; ++c) pivot[c] = coarse(pivot[c] * share, m2[c] * share);

  const auto add = [=](const At& at, auto lanes, Vec(&sums)[2][2]) {
    const Pair value = widen(load_ahead(y + at.offset, at.ahead, lanes));
    for (int h = 0; h < 2; ++h) {
      const Vec d = value.v[h] - load(pivot + at.local + h * LANES);
      sums[0][h] += d;
      sums[1][h] = fma(d, d, sums[1][h]);
    }
  };
  sum_tile<T, READ_ROWS>(tile, k, add, {residue, m2});
  const float per_row = 1 / static_cast<float>(tile.row_end - tile.row);
  for (int64_t c = 0; c < count; ++c) m2[c] -= residue[c] * residue[c] * per_row;
}

template <class T>
void bn_stats_kernel(const BnStats& args) {
  const T* y = static_cast<const T*>(args.y);
  const Tiles tiles{args.npq, args.k};
  const int64_t k = args.k, blocks = tiles.row_blocks(), plane = blocks * padded(k);
  const int64_t height = tiles.height();
  float* pivots = args.workspace;
  float* residues = pivots + plane;
  float* m2s = residues + plane;

  for_each_tile(tiles, [&](const Tile& tile) {
    const int64_t start = tile.index * padded(k) + tile.channel;
    bn_stats_tile(y, tile, k, pivots + start, residues + start, m2s + start);
  });

  for_each_merge(blocks, k, [&](int64_t first, int64_t count) {
    const double npq = static_cast<double>(args.npq);
    double mean[PACK], m2[PACK];
    merge(blocks, PACK, mean, [&](int64_t index, int64_t i) {
      const double n = static_cast<double>(smaller(height, args.npq - index * height));
      const int64_t at = index * padded(k) + first + i;
      return n * pivots[at] + residues[at];
    });
    for (double& m : mean) m /= npq > 0 ? npq : 1;
    merge(blocks, PACK, m2, [&](int64_t index, int64_t i) {
      const double n = static_cast<double>(smaller(height, args.npq - index * height));
      const double share = 1 / n;
      const int64_t at = index * padded(k) + first + i;
      const double d = pivots[at] - mean[i] + residues[at] * share;
      return m2s[at] + d * d * n;
    });
    double means[PACK] = {}, m2_of[PACK] = {};
    for_each_widened<T>(count, [&](int64_t i, int64_t channel) {
      means[channel] = mean[i];
      m2_of[channel] = m2[i];
    });
    normalise(args, first, count, means, m2_of, npq);
  });
}

// bn_stats of the union of T parts: mean = sum(n_t * mean_t) / n, M2 = sum(M2_t + n_t * (mean_t -
// mean)^2)
// Shapes    n (T,); means, vars (T, K); gamma, beta, mean, var, rstd, scale, shift (K,); all fp32
// Tiles     PACK channels, shared out to the threads where there is work for several
// Traffic   reads means, vars: 2 * T * K * 4, twice; T is the number of ranks
// Numerics  in double, parts in order (Chan, Golub, LeVeque 1979)
// Source    ops.bn_finalize; docs/bn_act.md
void bn_finalize_kernel(const BnFinalize& args) {
  const int64_t k = args.k;
  double n = 0;
  for (int64_t part = 0; part < args.parts; ++part) n += args.n[part];
  for_each_merge(args.parts, k, [&](int64_t first, int64_t count) {
    double mean[PACK], m2[PACK];
    merge(args.parts, count, mean, [&](int64_t part, int64_t i) {
      return double{args.n[part]} * args.means[part * k + first + i];
    });
    for (double& m : mean) m /= n > 1 ? n : 1;
    merge(args.parts, count, m2, [&](int64_t part, int64_t i) {
      const double values = args.n[part];
      const double d = args.means[part * k + first + i] - mean[i];
      return args.vars[part * k + first + i] * (values > 1 ? values - 1 : 0) + d * d * values;
    });
    normalise(args, first, count, mean, m2, n);
  });
}

struct NoResidual {
  template <class Lanes, class Vectors>
  void operator()(Pair&, const At&, Lanes, const Vectors&) const {}
};

template <class T>
struct PlainResidual {
  const T* residual;

  template <class Lanes, class Vectors>
  void operator()(Pair& value, const At& at, Lanes lanes, const Vectors&) const {
    const Pair r = widen(load_pack(residual + at.offset, lanes));
    for (int h = 0; h < 2; ++h) value.v[h] += r.v[h];
  }
};

template <class T>
struct AffineResidual {
  const T* residual;

  template <class Lanes, class Vectors>
  void operator()(Pair& value, const At& at, Lanes lanes, const Vectors& vectors) const {
    const Pair r = widen(load_pack(residual + at.offset, lanes));
    for (int h = 0; h < 2; ++h) {
      value.v[h] += fma(r.v[h], vectors(2, at.local, h), vectors(3, at.local, h));
    }
  }
};

// z = act(y * scale + shift [+ residual | + residual * rscale + rshift]);  mask = bits of !(z <= 0)
// Shapes    y, residual, z (NPQ, K) channels-last; scale, shift, rscale, rshift (K,) fp32;
//           mask (NPQ, ceil(K / 8)) bytes
// Tiles     rows, shared out to the threads
// Traffic   reads y, residual, writes z: 3 * NPQ * K * itemsize; no reuse, bandwidth is the limit.
//           mask: NPQ * K / 8 more
// Numerics  fp32 from load to store; one rounding, at the store; relu(NaN) = NaN
// Source    ops.affine_act, ops.affine_act_mask; docs/bn_act.md
template <bool RELU, bool MASK, class T, class Residual>
void affine_act_kernel(const AffineAct& args, T, Residual add_residual) {
  const T* y = static_cast<const T*>(args.y);
  T* z = static_cast<T*>(args.z);
  uint8_t* mask = args.mask;
  const int64_t mask_k = cdiv(args.k, 8);
  const auto body = [=](const At& at, auto lanes, const auto& vectors) {
    Pair value = widen(load_pack(y + at.offset, lanes));
    for (int h = 0; h < 2; ++h) {
      value.v[h] = fma(value.v[h], vectors(0, at.local, h), vectors(1, at.local, h));
    }
    add_residual(value, at, lanes, vectors);
    if constexpr (RELU) {
      for (int h = 0; h < 2; ++h) value.v[h] = relu(value.v[h]);
    }
    const Pack<T> stored = narrow(value, T{});
    store_pack(z + at.offset, stored, lanes);
    if constexpr (MASK) store_mask(mask + at.row * mask_k, at.channel, active_bits(stored), lanes);
  };
  for_each_element<T>(args.npq, args.k, {args.scale, args.shift, args.rscale, args.rshift}, body);
}

template <class T, class Residual>
void affine_act_kernel(const AffineAct& args, T type, Residual add_residual) {
  if (args.relu && args.mask) {
    affine_act_kernel<true, true>(args, type, add_residual);
  } else if (args.relu) {
    affine_act_kernel<true, false>(args, type, add_residual);
  } else if (args.mask) {
    affine_act_kernel<false, true>(args, type, add_residual);
  } else {
    affine_act_kernel<false, false>(args, type, add_residual);
  }
}

void bn_stats(const BnStats& args) {
  visit(args.dtype, [&](auto type) { bn_stats_kernel<decltype(type)>(args); });
}

void affine_act(const AffineAct& args) {
  visit(args.dtype, [&](auto type) {
    using T = decltype(type);
    const T* residual = static_cast<const T*>(args.residual);
    if (!residual) {
      affine_act_kernel(args, type, NoResidual{});
    } else if (!args.rscale) {
      affine_act_kernel(args, type, PlainResidual<T>{residual});
    } else {
      affine_act_kernel(args, type, AffineResidual<T>{residual});
    }
  });
}

}  // namespace

const BnAct bn_act = {bn_workspace, bn_stats, bn_finalize_kernel, affine_act};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
