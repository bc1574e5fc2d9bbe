// BatchNorm, ReLU and residual add around a convolution, and their backward, on the CPU.
//
// setup.py compiles this file once per instruction set, each into a namespace of its own; isa.cpp
// picks one. Arithmetic is fp32 whatever the storage. Tiles follow from the shape alone and are
// merged in order, so results do not depend on the number of threads.
#include <type_traits>

#include "isa.h"
#include "vec.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// A sum down a tile's rows is fp32, and its rounding error grows with them. Rows of up to 512
// channels are read from end to end: the prefetchers follow, and the sums stay in L1.
constexpr int64_t BLOCK_NPQ = 128;
constexpr int64_t BLOCK_K = 512;
// Rows whose sum is formed in registers before it is added to that of the tile.
constexpr int64_t GROUP_NPQ = 4;
// Channels that one thread merges at a time.
constexpr int64_t MERGE_K = 64;
constexpr int64_t PIVOT_ROWS = 8;
// Waking the other threads costs more than this many elements.
constexpr int64_t SERIAL = 32768;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// One tile: rows [row, row_end) and channels [channel, channel_end); `index` counts row blocks.
struct Tile {
  int64_t index, row, row_end, channel, channel_end;
};

/// An (npq, k) matrix cut into tiles.
struct Tiles {
  int64_t npq, k;

  int64_t row_blocks() const { return cdiv(npq, BLOCK_NPQ); }
  int64_t channel_blocks() const { return cdiv(k, BLOCK_K); }
  int64_t rows(int64_t index) const { return smaller(BLOCK_NPQ, npq - index * BLOCK_NPQ); }

  Tile operator[](int64_t i) const {
    const int64_t index = i / channel_blocks();
    const int64_t row = index * BLOCK_NPQ;
    const int64_t channel = i % channel_blocks() * BLOCK_K;
    return {index, row, row + rows(index), channel, smaller(channel + BLOCK_K, k)};
  }
};

template <class Body>
void for_each_tile(const Tiles& tiles, Body body) {
  const int64_t count = tiles.row_blocks() * tiles.channel_blocks();
#pragma omp parallel for schedule(static) if (tiles.npq * tiles.k > SERIAL)
  for (int64_t i = 0; i < count; ++i) body(tiles[i]);
}

/// Calls body(channel, lanes) on every vector of the channels [first, last).
template <class Body>
void for_each_vector(int64_t first, int64_t last, const Body& body) {
  int64_t channel = first;
  for (; channel + LANES <= last; channel += LANES) body(channel, All{});
  if (channel < last) body(channel, First{static_cast<int>(last - channel)});
}

/// The skeleton of every elementwise op: calls body(offset, channel, lanes) on every vector of an
/// (npq, k) matrix.
template <class Body>
void for_each_element(int64_t npq, int64_t k, const Body& body) {
#pragma omp parallel for schedule(static) if (npq * k > SERIAL)
  for (int64_t row = 0; row < npq; ++row) {
    const Body local =
        body;  // what it holds stays in registers: a store could change the shared one
    for_each_vector(0, k,
                    [=](int64_t channel, auto lanes) { local(row * k + channel, channel, lanes); });
  }
}

/// The sums of one vector of channels over ROWS rows from `row`, added to the tile's, or set if the
/// tile begins here.
template <int64_t ROWS, int SUMS, class Add, class Lanes>
void sum_group(int64_t row, bool begins, int64_t k, int64_t channel, Lanes lanes, const Add& add,
               float* const (&out)[SUMS]) {
  Vec sums[SUMS] = {};
  for (int64_t r = 0; r < ROWS; ++r) add((row + r) * k + channel, channel, lanes, sums);
  for (int s = 0; s < SUMS; ++s) {
    float* total = out[s] + channel;
    store(total, begins ? sums[s] : load(total, lanes) + sums[s], lanes);
  }
}

/// The skeleton of every reduction: add(offset, channel, lanes, sums) adds one vector of a tile to
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

/// Calls body(first, last) on blocks of at most MERGE_K channels.
template <class Body>
void for_each_channel_block(const Tiles& tiles, Body body) {
  const int64_t count = cdiv(tiles.k, MERGE_K);
#pragma omp parallel for schedule(static) if (tiles.row_blocks() * tiles.k > SERIAL)
  for (int64_t i = 0; i < count; ++i) body(i * MERGE_K, smaller((i + 1) * MERGE_K, tiles.k));
}

/// total[c - first] = sum of term(tile index, c) over the row blocks in order, in double.
template <class Term>
void merge(const Tiles& tiles, int64_t first, int64_t last, double (&total)[MERGE_K], Term term) {
  for (double& t : total) t = 0;
  for (int64_t index = 0; index < tiles.row_blocks(); ++index) {
#pragma omp simd
    for (int64_t c = first; c < last; ++c) total[c - first] += term(index, c);
  }
}

/// Merges SUMS workspace planes of (row_blocks, k) into SUMS outputs of (k,).
template <int SUMS>
void merge_sums(const Tiles& tiles, const float* workspace, float* const (&out)[SUMS]) {
  const int64_t plane = tiles.row_blocks() * tiles.k;
  for_each_channel_block(tiles, [&](int64_t first, int64_t last) {
    double total[MERGE_K];
    for (int s = 0; s < SUMS; ++s) {
      const float* partial = workspace + s * plane;
      merge(tiles, first, last, total,
            [=](int64_t index, int64_t c) { return double{partial[index * tiles.k + c]}; });
      for (int64_t c = first; c < last; ++c) out[s][c] = static_cast<float>(total[c - first]);
    }
  });
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
  merge_sums(tiles, workspace, out);
}

int64_t bn_workspace(int64_t npq, int64_t k) { return 3 * Tiles{npq, k}.row_blocks() * k; }

/// `mean` less what lies below 2^-13 of `size`, or 0 if that is not finite. In sums of y - pivot a
/// pivot of many bits would be rounded the same way at every addition, where y itself has few.
float coarse(float mean, float size) {
  const float anchor = 1024 * size;
  const float pivot = (mean + anchor) - anchor;
  return pivot - pivot == 0 ? pivot : 0;
}

// mean = sum(y) / NPQ;  var = sum((y - mean)^2) / NPQ
// Shapes    y (NPQ, K) channels-last; mean, var (K,) fp32; workspace (3, row blocks, K) fp32
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
  const auto add_head = [=](int64_t offset, int64_t, auto lanes, Vec(&sums)[2]) {
    const Vec value = load(y + offset, lanes);
    sums[0] += value;
    sums[1] += absolute(value);
  };
  sum_tile<2>(head, k, add_head, {pivot, m2});
  const float rows = static_cast<float>(head.row_end - head.row);
  for (int64_t c = tile.channel; c < tile.channel_end; ++c) {
    pivot[c] = coarse(pivot[c] / rows, m2[c] / rows);
  }

  const auto add = [=](int64_t offset, int64_t channel, auto lanes, Vec(&sums)[2]) {
    const Vec d = load(y + offset, lanes) - load(pivot + channel, lanes);
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

  for_each_channel_block(tiles, [&](int64_t first, int64_t last) {
    const double npq = static_cast<double>(args.npq > 0 ? args.npq : 1);
    double mean[MERGE_K], m2[MERGE_K];
    merge(tiles, first, last, mean, [&](int64_t index, int64_t c) {
      const double n = static_cast<double>(tiles.rows(index));
      return n * pivots[index * k + c] + residues[index * k + c];
    });
    for (double& m : mean) m /= npq;
    merge(tiles, first, last, m2, [&](int64_t index, int64_t c) {
      const double n = static_cast<double>(tiles.rows(index));
      const double d = pivots[index * k + c] - mean[c - first] + residues[index * k + c] / n;
      return m2s[index * k + c] + d * d * n;
    });
    for (int64_t c = first; c < last; ++c) {
      const double var = m2[c - first] / npq;
      args.mean[c] = static_cast<float>(mean[c - first]);
      args.var[c] = var < 0 ? 0.0f : static_cast<float>(var);  // keeps NaN
    }
  });
}

struct NoResidual {
  template <class Lanes>
  Vec operator()(Vec value, int64_t, int64_t, Lanes) const {
    return value;
  }
};

template <class T>
struct PlainResidual {
  const T* residual;

  template <class Lanes>
  Vec operator()(Vec value, int64_t offset, int64_t, Lanes lanes) const {
    return value + load(residual + offset, lanes);
  }
};

template <class T>
struct AffineResidual {
  const T* residual;
  const float* rscale;
  const float* rshift;

  template <class Lanes>
  Vec operator()(Vec value, int64_t offset, int64_t channel, Lanes lanes) const {
    return value + fma(load(residual + offset, lanes), load(rscale + channel, lanes),
                       load(rshift + channel, lanes));
  }
};

// z = act(y * scale + shift [+ residual | + residual * rscale + rshift])
// Shapes    y, residual, z (NPQ, K) channels-last; scale, shift, rscale, rshift (K,) fp32
// Tiles     rows, shared out to the threads
// Traffic   reads y, residual, writes z: 3 * NPQ * K * itemsize; no reuse, bandwidth is the limit
// Numerics  fp32 from load to store; one rounding, at the store; relu(NaN) = NaN
// Source    ops.affine_act; docs/bn_act.md
template <bool RELU, class T, class Residual>
void affine_act_kernel(const AffineAct& args, T, Residual add_residual) {
  const T* y = static_cast<const T*>(args.y);
  T* z = static_cast<T*>(args.z);
  const float* scale = args.scale;
  const float* shift = args.shift;
  for_each_element(args.npq, args.k, [=](int64_t offset, int64_t channel, auto lanes) {
    Vec value =
        fma(load(y + offset, lanes), load(scale + channel, lanes), load(shift + channel, lanes));
    value = add_residual(value, offset, channel, lanes);
    store(z + offset, RELU ? relu(value) : value, lanes);
  });
}

template <class T, class Residual>
void affine_act_kernel(const AffineAct& args, T type, Residual add_residual) {
  if (args.relu) {
    affine_act_kernel<true>(args, type, add_residual);
  } else {
    affine_act_kernel<false>(args, type, add_residual);
  }
}

// g = dz where z > 0 else 0;  sum_g = sum(g);  sum_gy = sum(g * (y - mean));  sum_gry likewise
// Shapes    dz, z, y, ry, g (NPQ, K) channels-last; mean, rmean, sums (K,) fp32;
//           workspace (SUMS, row blocks, K) fp32
// Tiles     as bn_stats
// Traffic   reads dz, z, y, ry, writes g: 5 * NPQ * K * itemsize (4 without ry)
// Numerics  fp32 sums over a tile, tiles merged in double, in order; g is dz or 0, exactly
// Source    ops.affine_act_backward; docs/bn_act.md
template <int SUMS, class T>
void affine_act_backward_kernel(const AffineActBackward& args, float* const (&out)[SUMS]) {
  const T* dz = static_cast<const T*>(args.dz);
  const T* z = static_cast<const T*>(args.z);
  const T* y = static_cast<const T*>(args.y);
  const T* ry = static_cast<const T*>(args.ry);
  T* g = static_cast<T*>(args.g);
  const float* mean = args.mean;
  const float* rmean = args.rmean;
  const auto add = [=](int64_t offset, int64_t channel, auto lanes, Vec(&sums)[SUMS]) {
    const Vec gradient = where_active(load(z + offset, lanes), load(dz + offset, lanes));
    const Vec centred = load(y + offset, lanes) - load(mean + channel, lanes);
    sums[0] += gradient;
    sums[1] = fma(gradient, centred, sums[1]);
    if constexpr (SUMS == 3) {
      const Vec rcentred = load(ry + offset, lanes) - load(rmean + channel, lanes);
      sums[2] = fma(gradient, rcentred, sums[2]);
    }
    store(g + offset, gradient, lanes);
  };
  reduce<SUMS>(args.npq, args.k, args.workspace, add, out);
}

/// g of a gradient dz that comes without a ReLU: itself.
template <class T>
struct Gradient {
  const T* dz;

  template <class Lanes>
  Vec operator()(Vec, int64_t offset, int64_t, Lanes lanes) const {
    return load(dz + offset, lanes);
  }
};

/// g behind a ReLU whose output was not kept: the mask is recomputed as affine_act computed it.
template <class T>
struct MaskedGradient {
  const T* dz;
  const float* scale;
  const float* shift;

  template <class Lanes>
  Vec operator()(Vec y, int64_t offset, int64_t channel, Lanes lanes) const {
    const Vec preactivation = fma(y, load(scale + channel, lanes), load(shift + channel, lanes));
    return where_active(preactivation, load(dz + offset, lanes));
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
  const auto add = [=](int64_t offset, int64_t channel, auto lanes, Vec(&sums)[2]) {
    const Vec value = load(y + offset, lanes);
    const Vec gradient = g(value, offset, channel, lanes);
    sums[0] += gradient;
    sums[1] = fma(gradient, value - load(mean + channel, lanes), sums[1]);
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
  for_each_element(args.npq, args.k, [=](int64_t offset, int64_t channel, auto lanes) {
    const Vec value = load(y + offset, lanes);
    const Vec gradient = g(value, offset, channel, lanes);
    const Vec centred = value - load(mean + channel, lanes);
    const Vec rest = fma(load(b + channel, lanes), centred, load(c + channel, lanes));
    store(dy + offset, fma(load(a + channel, lanes), gradient, rest), lanes);
  });
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

void affine_act_backward(const AffineActBackward& args) {
  visit(args.dtype, [&](auto type) {
    using T = decltype(type);
    // An empty tensor's address may be 0: with no rows, sum_gry alone says that there is an ry.
    if (args.ry || (args.sum_gry && args.npq == 0)) {
      affine_act_backward_kernel<3, T>(args, {args.sum_g, args.sum_gy, args.sum_gry});
    } else {
      affine_act_backward_kernel<2, T>(args, {args.sum_g, args.sum_gy});
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

const BnAct bn_act = {bn_workspace,        bn_stats,         affine_act,
                      affine_act_backward, bn_backward_sums, bn_backward_apply};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
