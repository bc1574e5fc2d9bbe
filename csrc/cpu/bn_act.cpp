// BatchNorm, ReLU and residual add around a convolution, and their backward, on the CPU.
//
// setup.py compiles this file once per instruction set, each into a namespace of its own; isa.cpp
// picks one. Arithmetic is fp32 whatever the storage.
#include <type_traits>

#include "isa.h"
#include "tiles.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Rows whose sum is formed in registers before it is added to that of the tile.
constexpr int64_t GROUP_NPQ = 4;
constexpr int64_t PIVOT_ROWS = 8;

/// Where a vector lies: at `offset` of the matrix, which is `channel` of `row`.
struct At {
  int64_t offset, row, channel;
};

/// The skeleton of every elementwise op: calls body(at, lanes) on every vector of an (npq, k)
/// matrix.
template <class Body>
void for_each_element(int64_t npq, int64_t k, const Body& body) {
#pragma omp parallel for schedule(static) if (npq * k > SERIAL)
  for (int64_t row = 0; row < npq; ++row) {
    const Body local =
        body;  // what it holds stays in registers: a store could change the shared one
    for_each_vector(0, k, [=](int64_t channel, auto lanes) {
      local(At{row * k + channel, row, channel}, lanes);
    });
  }
}

/// The sums of one vector of channels over ROWS rows from `row`, added to the tile's, or set if the
/// tile begins here.
template <int64_t ROWS, int SUMS, class Add, class Lanes>
void sum_group(int64_t row, bool begins, int64_t k, int64_t channel, Lanes lanes, const Add& add,
               float* const (&out)[SUMS]) {
  Vec sums[SUMS] = {};
  for (int64_t r = 0; r < ROWS; ++r)
    add(At{(row + r) * k + channel, row + r, channel}, lanes, sums);
  for (int s = 0; s < SUMS; ++s) {
    float* total = out[s] + channel;
    store(total, begins ? sums[s] : load(total, lanes) + sums[s], lanes);
  }
}

/// The skeleton of every reduction: add(at, lanes, sums) adds one vector of a tile to
/// its channels' SUMS sums, which go to out[0..SUMS) at the tile's channels.
template <int SUMS, class Add>
void sum_tile(const Tile& tile, int64_t k, Add add, float* const (&out)[SUMS]) {
  const auto sum_rows = [&](int64_t row, auto rows) {
    for_each_vector(tile.channel, tile.channel_end, [&](int64_t channel, auto lanes) {
      sum_group<rows()>(row, row == tile.row, k, channel, lanes, add, out);
    });
  };
  int64_t row = tile.row;
  for (; row + GROUP_NPQ <= tile.row_end; row += GROUP_NPQ) {
    sum_rows(row, std::integral_constant<int64_t, GROUP_NPQ>{});
  }
  for (; row < tile.row_end; ++row) sum_rows(row, std::integral_constant<int64_t, 1>{});
}

/// Reduces SUMS sums over the whole matrix: tiles into the workspace, then the tiles in order.
template <int SUMS, class Add>
void reduce(int64_t npq, int64_t k, float* workspace, const Add& add, float* const (&out)[SUMS]) {
  const Tiles tiles{npq, k};
  const int64_t plane = tiles.row_blocks() * k;
  for_each_tile(tiles, [&](const Tile& tile) {
    float* partial[SUMS];
    for (int s = 0; s < SUMS; ++s) partial[s] = workspace + s * plane + tile.index * k;
    sum_tile<SUMS>(tile, k, add, partial);
  });
  merge_sums(tiles.row_blocks(), k, workspace, out);
}

int64_t bn_workspace(int64_t npq, int64_t k) { return 3 * Tiles{npq, k}.row_blocks() * k; }

/// `mean` less what lies below 2^-13 of `size`, or 0 if that is not finite. In sums of y - pivot a
/// pivot of many bits would be rounded the same way at every addition, where y itself has few.
float coarse(float mean, float size) {
  const float anchor = 1024 * size;
  const float pivot = (mean + anchor) - anchor;
  return pivot - pivot == 0 ? pivot : 0;
}

/// What bn_stats and bn_finalize return of channel c, from its mean and its M2 over n values.
template <class Args>
void normalise(const Args& args, int64_t c, double mean, double m2, double n) {
  const double squares = m2 < 0 ? 0 : m2;  // keeps NaN
  const double rstd = 1 / __builtin_sqrt(squares / (n > 1 ? n : 1) + double{args.eps});
  const float scale = static_cast<float>(args.gamma ? args.gamma[c] * rstd : rstd);
  args.mean[c] = static_cast<float>(mean);
  args.var[c] = static_cast<float>(squares / (n > 2 ? n - 1 : 1));
  args.rstd[c] = static_cast<float>(rstd);
  args.scale[c] = scale;
  // Of the scale as it is rounded: y * scale + shift is then beta at the mean, however large that.
  args.shift[c] = static_cast<float>((args.beta ? args.beta[c] : 0.0) - mean * scale);
}

// mean = sum(y) / NPQ;  var = sum((y - mean)^2) / (NPQ - 1);  rstd, scale, shift follow
// Shapes    y (NPQ, K) channels-last; gamma, beta, mean, var, rstd, scale, shift (K,) fp32;
//           workspace (3, row blocks, K) fp32
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
  const auto add_head = [=](const At& at, auto lanes, Vec(&sums)[2]) {
    const Vec value = load(y + at.offset, lanes);
    sums[0] += value;
    sums[1] += absolute(value);
  };
  sum_tile<2>(head, k, add_head, {pivot, m2});
  const float rows = static_cast<float>(head.row_end - head.row);
  for (int64_t c = tile.channel; c < tile.channel_end; ++c) {
    pivot[c] = coarse(pivot[c] / rows, m2[c] / rows);
  }

  const auto add = [=](const At& at, auto lanes, Vec(&sums)[2]) {
    const Vec d = load(y + at.offset, lanes) - load(pivot + at.channel, lanes);
    sums[0] += d;
    sums[1] = fma(d, d, sums[1]);
  };
  sum_tile<2>(tile, k, add, {residue, m2});
  const float n = static_cast<float>(tile.row_end - tile.row);
  for (int64_t c = tile.channel; c < tile.channel_end; ++c) {
    m2[c] -= residue[c] * residue[c] / n;
  }
}

template <class T>
void bn_stats_kernel(const BnStats& args) {
  const T* y = static_cast<const T*>(args.y);
  const Tiles tiles{args.npq, args.k};
  const int64_t k = args.k;
  const int64_t plane = tiles.row_blocks() * k;
  float* pivots = args.workspace;
  float* residues = pivots + plane;
  float* m2s = residues + plane;

  for_each_tile(tiles, [&](const Tile& tile) {
    const int64_t row = tile.index * k;
    bn_stats_tile(y, tile, k, pivots + row, residues + row, m2s + row);
  });

  for_each_channel_block(tiles.row_blocks(), k, [&](int64_t first, int64_t last) {
    const double npq = static_cast<double>(args.npq);
    double mean[MERGE_K], m2[MERGE_K];
    merge(tiles.row_blocks(), first, last, mean, [&](int64_t index, int64_t c) {
      const double n = static_cast<double>(tiles.rows(index));
      return n * pivots[index * k + c] + residues[index * k + c];
    });
    for (double& m : mean) m /= npq > 0 ? npq : 1;
    merge(tiles.row_blocks(), first, last, m2, [&](int64_t index, int64_t c) {
      const double n = static_cast<double>(tiles.rows(index));
      const double d = pivots[index * k + c] - mean[c - first] + residues[index * k + c] / n;
      return m2s[index * k + c] + d * d * n;
    });
    for (int64_t c = first; c < last; ++c) {
      normalise(args, c, mean[c - first], m2[c - first], npq);
    }
  });
}

// bn_stats of the union of T parts: mean = sum(n_t * mean_t) / n, M2 = sum(M2_t + n_t * (mean_t -
// mean)^2)
// Shapes    n (T,); means, vars (T, K); gamma, beta, mean, var, rstd, scale, shift (K,); all fp32
// Tiles     MERGE_K channels, shared out to the threads where there is work for several
// Traffic   reads means, vars: 2 * T * K * 4, twice; T is the number of ranks
// Numerics  in double, parts in order (Chan, Golub, LeVeque 1979)
// Source    ops.bn_finalize; docs/bn_act.md
void bn_finalize_kernel(const BnFinalize& args) {
  const int64_t k = args.k;
  double n = 0;
  for (int64_t part = 0; part < args.parts; ++part) n += args.n[part];
  for_each_channel_block(args.parts, k, [&](int64_t first, int64_t last) {
    double mean[MERGE_K], m2[MERGE_K];
    merge(args.parts, first, last, mean,
          [&](int64_t part, int64_t c) { return double{args.n[part]} * args.means[part * k + c]; });
    for (double& m : mean) m /= n > 1 ? n : 1;
    merge(args.parts, first, last, m2, [&](int64_t part, int64_t c) {
      const double count = args.n[part];
      const double d = args.means[part * k + c] - mean[c - first];
      return args.vars[part * k + c] * (count > 1 ? count - 1 : 0) + d * d * count;
    });
    for (int64_t c = first; c < last; ++c) normalise(args, c, mean[c - first], m2[c - first], n);
  });
}

struct NoResidual {
  template <class Lanes>
  Vec operator()(Vec value, const At&, Lanes) const {
    return value;
  }
};

template <class T>
struct PlainResidual {
  const T* residual;

  template <class Lanes>
  Vec operator()(Vec value, const At& at, Lanes lanes) const {
    return value + load(residual + at.offset, lanes);
  }
};

template <class T>
struct AffineResidual {
  const T* residual;
  const float* rscale;
  const float* rshift;

  template <class Lanes>
  Vec operator()(Vec value, const At& at, Lanes lanes) const {
    return value + fma(load(residual + at.offset, lanes), load(rscale + at.channel, lanes),
                       load(rshift + at.channel, lanes));
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
  const float* scale = args.scale;
  const float* shift = args.shift;
  uint8_t* mask = args.mask;
  const int64_t mask_k = cdiv(args.k, 8);
  for_each_element(args.npq, args.k, [=](const At& at, auto lanes) {
    Vec value = fma(load(y + at.offset, lanes), load(scale + at.channel, lanes),
                    load(shift + at.channel, lanes));
    value = add_residual(value, at, lanes);
    value = RELU ? relu(value) : value;
    store(z + at.offset, value, lanes);
    if constexpr (MASK) {
      const uint32_t bits = active_bits(as_stored(value, T{}));
      store_mask(mask + at.row * mask_k, at.channel, bits, lanes);
    }
  });
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

/// Where z, as it was written, lets a gradient pass.
template <class T>
struct GateByActivation {
  const T* z;

  template <class Lanes>
  Vec operator()(Vec dz, const At& at, Lanes lanes) const {
    return where_active(load(z + at.offset, lanes), dz);
  }
};

/// The same from the bits that affine_act left.
struct GateByMask {
  const uint8_t* mask;
  int64_t mask_k;

  template <class Lanes>
  Vec operator()(Vec dz, const At& at, Lanes lanes) const {
    return where_bits(load_mask(mask + at.row * mask_k, at.channel, lanes), dz);
  }
};

// g = dz where z > 0 else 0;  sum_g = sum(g);  sum_gy = sum(g * (y - mean));  sum_gry likewise
// Shapes    dz, z, y, ry, g (NPQ, K) channels-last; mask (NPQ, ceil(K / 8)) bytes; mean, rmean,
//           sums (K,) fp32; workspace (SUMS, row blocks, K) fp32
// Tiles     as bn_stats
// Traffic   reads dz, z, y, ry, writes g: 5 * NPQ * K * itemsize (4 without ry; one less with a
//           mask, which is NPQ * K / 8)
// Numerics  fp32 sums over a tile, tiles merged in double, in order; g is dz or 0, exactly
// Source    ops.affine_act_backward; docs/bn_act.md
template <int SUMS, class T, class Gate>
void affine_act_backward_kernel(const AffineActBackward& args, T, Gate gate,
                                float* const (&out)[SUMS]) {
  const T* dz = static_cast<const T*>(args.dz);
  const T* y = static_cast<const T*>(args.y);
  const T* ry = static_cast<const T*>(args.ry);
  T* g = static_cast<T*>(args.g);
  const float* mean = args.mean;
  const float* rmean = args.rmean;
  const auto add = [=](const At& at, auto lanes, Vec(&sums)[SUMS]) {
    const Vec gradient = gate(load(dz + at.offset, lanes), at, lanes);
    const Vec centred = load(y + at.offset, lanes) - load(mean + at.channel, lanes);
    sums[0] += gradient;
    sums[1] = fma(gradient, centred, sums[1]);
    if constexpr (SUMS == 3) {
      const Vec rcentred = load(ry + at.offset, lanes) - load(rmean + at.channel, lanes);
      sums[2] = fma(gradient, rcentred, sums[2]);
    }
    store(g + at.offset, gradient, lanes);
  };
  reduce<SUMS>(args.npq, args.k, args.workspace, add, out);
}

/// g of a gradient dz that comes without a ReLU: itself.
template <class T>
struct Gradient {
  const T* dz;

  template <class Lanes>
  Vec operator()(Vec, const At& at, Lanes lanes) const {
    return load(dz + at.offset, lanes);
  }
};

/// g behind a ReLU whose output was not kept: the mask is recomputed as affine_act computed it.
template <class T>
struct MaskedGradient {
  const T* dz;
  const float* scale;
  const float* shift;

  template <class Lanes>
  Vec operator()(Vec y, const At& at, Lanes lanes) const {
    const Vec preactivation =
        fma(y, load(scale + at.channel, lanes), load(shift + at.channel, lanes));
    return where_active(preactivation, load(dz + at.offset, lanes));
  }
};

// sum_g = sum(g);  sum_gy = sum(g * (y - mean));  g = dz where y * scale + shift > 0 else 0
// Shapes    dz, y (NPQ, K) channels-last; mean, scale, shift, sums (K,) fp32;
//           workspace (2, row blocks, K) fp32
// Tiles     as bn_stats
// Traffic   reads dz, y: 2 * NPQ * K * itemsize
// Numerics  fp32 sums over a tile, tiles merged in double, in order
// Source    ops.bn_backward_sums; docs/bn_act.md
template <class T, class G>
void bn_backward_sums_kernel(const BnBackwardSums& args, T, G g) {
  const T* y = static_cast<const T*>(args.y);
  const float* mean = args.mean;
  const auto add = [=](const At& at, auto lanes, Vec(&sums)[2]) {
    const Vec value = load(y + at.offset, lanes);
    const Vec gradient = g(value, at, lanes);
    sums[0] += gradient;
    sums[1] = fma(gradient, value - load(mean + at.channel, lanes), sums[1]);
  };
  reduce<2>(args.npq, args.k, args.workspace, add, {args.sum_g, args.sum_gy});
}

// dy = a * g + b * (y - mean) + c;  g = dz where y * scale + shift > 0 else 0
// Shapes    dz, y, dy (NPQ, K) channels-last; mean, a, b, c, scale, shift (K,) fp32
// Tiles     rows, shared out to the threads
// Traffic   reads dz, y, writes dy: 3 * NPQ * K * itemsize; no reuse, bandwidth is the limit
// Numerics  fp32 from load to store; one rounding, at the store
// Source    ops.bn_backward_apply; docs/bn_act.md
template <class T, class G>
void bn_backward_apply_kernel(const BnBackwardApply& args, T, G g) {
  const T* y = static_cast<const T*>(args.y);
  T* dy = static_cast<T*>(args.dy);
  const float* mean = args.mean;
  const float* a = args.a;
  const float* b = args.b;
  const float* c = args.c;
  for_each_element(args.npq, args.k, [=](const At& at, auto lanes) {
    const Vec value = load(y + at.offset, lanes);
    const Vec gradient = g(value, at, lanes);
    const Vec centred = value - load(mean + at.channel, lanes);
    const Vec rest = fma(load(b + at.channel, lanes), centred, load(c + at.channel, lanes));
    store(dy + at.offset, fma(load(a + at.channel, lanes), gradient, rest), lanes);
  });
}

// b = -scale * rstd^2 * sum_gy / n;  c = -scale * sum_g / n;  dgamma = rstd * sum_gy
// Shapes    sum_g, sum_gy, rstd, scale, b, c, dgamma (K,) fp32
// Tiles     one thread: a few thousand channels at most
// Traffic   7 * K * 4
// Numerics  in double, rounded once; n = 0 makes b and c 0
// Source    ops.bn_backward_finalize; docs/bn_act.md
void bn_backward_finalize_kernel(const BnBackwardFinalize& args) {
  const double share = args.n > 0 ? -1 / args.n : 0;
  for (int64_t c = 0; c < args.k; ++c) {
    const double a = share * args.scale[c], rstd = args.rstd[c];
    const double dgamma = rstd * args.sum_gy[c];
    args.c[c] = static_cast<float>(a * args.sum_g[c]);
    args.b[c] = static_cast<float>(a * rstd * dgamma);
    args.dgamma[c] = static_cast<float>(dgamma);
  }
}

/// Calls f(T, g) with the gradient functor that the arguments ask for.
template <class Args, class F>
void visit_gradient(const Args& args, F f) {
  visit(args.dtype, [&](auto type) {
    const auto* dz = static_cast<const decltype(type)*>(args.dz);
    if (args.scale) {
      f(type, MaskedGradient<decltype(type)>{dz, args.scale, args.shift});
    } else {
      f(type, Gradient<decltype(type)>{dz});
    }
  });
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
      affine_act_kernel(args, type, AffineResidual<T>{residual, args.rscale, args.rshift});
    }
  });
}

template <class T, class Gate>
void affine_act_backward(const AffineActBackward& args, T type, Gate gate) {
  // An empty tensor's address may be 0: with no rows, sum_gry alone says that there is an ry.
  if (args.ry || (args.sum_gry && args.npq == 0)) {
    affine_act_backward_kernel<3>(args, type, gate, {args.sum_g, args.sum_gy, args.sum_gry});
  } else {
    affine_act_backward_kernel<2>(args, type, gate, {args.sum_g, args.sum_gy});
  }
}

void affine_act_backward(const AffineActBackward& args) {
  visit(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.mask) {
      affine_act_backward(args, type, GateByMask{args.mask, cdiv(args.k, 8)});
    } else {
      affine_act_backward(args, type, GateByActivation<T>{static_cast<const T*>(args.z)});
    }
  });
}

void bn_backward_sums(const BnBackwardSums& args) {
  visit_gradient(args, [&](auto type, auto g) { bn_backward_sums_kernel(args, type, g); });
}

void bn_backward_apply(const BnBackwardApply& args) {
  visit_gradient(args, [&](auto type, auto g) { bn_backward_apply_kernel(args, type, g); });
}

}  // namespace

const BnAct bn_act = {
    bn_workspace,        bn_stats,         bn_finalize_kernel,          affine_act,
    affine_act_backward, bn_backward_sums, bn_backward_finalize_kernel, bn_backward_apply};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
