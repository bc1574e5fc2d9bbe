// BatchNorm, ReLU and residual add around a convolution, and their backward, on the CPU.
//
// setup.py compiles this file once per instruction set, each into a namespace of its own; isa.cpp
// picks one. Arithmetic is fp32 whatever the storage.
#include <omp.h>

#include <type_traits>

#include "isa.h"
#include "tiles.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Channels from which on the next packs of these rows are asked for, not those of the rows below.
constexpr int64_t WIDE = 512;
// What is asked for of narrower rows that are only read lies this far ahead: a page, where a stream
// ends for the processor's own prefetchers.
constexpr int64_t AHEAD_BYTES = 4096;
// Rows whose mean is a tile's pivot.
constexpr int64_t PIVOT_ROWS = 8;
// Channels whose vectors a thread keeps in L1 while it goes down its rows.
constexpr int64_t ELEMENT_K = 2048;

/// Where a pack lies: at `offset` of the matrix, which is `channel` of `row`, and `local` channels
/// from the first of its block. What lies `ahead` further is to be asked for, where rows are read
/// side by side: the processor's own prefetchers lose their way there.
struct At {
  int64_t offset, row, channel, local, ahead;
};

/// The skeleton of every elementwise op: calls body(at, lanes, vectors) on every pack of an (npq,
/// k) matrix of T.
template <class T, int COUNT, class Body>
void for_each_element(int64_t npq, int64_t k, const float* const (&vectors)[COUNT], Body body) {
  // Each thread has a body and a k of its own: shared ones are read again after every store.
#pragma omp parallel firstprivate(body, k) if (npq * k > SERIAL)
  {
    for (int64_t first = 0; first < k; first += ELEMENT_K) {
      const int64_t last = smaller(first + ELEMENT_K, k);
      const Channels<T, COUNT, ELEMENT_K> channels(vectors, first, last);
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < npq; ++row) {
        for_each_pack(first, last, [=, start = row * k, &channels](int64_t channel, auto lanes) {
          body(At{start + channel, row, channel, channel - first, 0}, lanes, channels);
        });
      }
    }
  }
}

/// The sums of COUNT packs side by side over ROWS rows from `row`, added to the tile's, or set if
/// the tile begins here.
template <class T, int64_t ROWS, int COUNT, int SUMS, class Add, class Lanes>
void sum_group(const Tile& tile, int64_t row, int64_t k, int64_t channel, Lanes lanes,
               const Add& add, float* const (&out)[SUMS]) {
  const int64_t local = channel - tile.channel;
  // Rows of many channels lie a page apart or nearly: those below would push out what is asked for.
  constexpr int64_t PAGE = AHEAD_BYTES / static_cast<int64_t>(sizeof(T));
  const int64_t ahead = k >= WIDE ? 2 * PACK : ROWS == READ_ROWS ? PAGE : ROWS * k;
  Vec sums[COUNT][SUMS][2] = {};
#pragma GCC unroll 2
  for (int64_t r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < COUNT; ++p) {
      const int64_t at = p * PACK;
      add(At{(row + r) * k + channel + at, row + r, channel + at, local + at, ahead}, lanes,
          sums[p]);
    }
  }
  for (int s = 0; s < SUMS; ++s) {
    for (int i = 0; i < 2 * COUNT; ++i) {
      float* total = out[s] + local + i * LANES;
      const Vec sum = sums[i / 2][s][i % 2];
      store(total, row == tile.row ? sum : load(total) + sum);
    }
  }
}

/// The skeleton of every reduction: add(at, lanes, sums) adds one pack of a tile to its channels'
/// SUMS sums. out[0..SUMS) get those of the tile, in the order of widened packs. ROWS rows are
/// summed in registers; where nothing is written two packs at a time, since one pack's sums are too
/// few to hide an addition's latency.
template <class T, int64_t ROWS, int SUMS, class Add>
void sum_tile(const Tile& tile, int64_t k, const Add& add, float* const (&out)[SUMS]) {
  constexpr int COUNT = ROWS == READ_ROWS ? 2 : 1;
  const auto sum_rows = [&](int64_t row, auto rows) {
    int64_t first = tile.channel;
    if constexpr (COUNT > 1) {
      for (; first + COUNT * PACK <= tile.channel_end; first += COUNT * PACK) {
        sum_group<T, rows(), COUNT>(tile, row, k, first, All{}, add, out);
      }
    }
    for_each_pack(first, tile.channel_end, [&](int64_t channel, auto lanes) {
      sum_group<T, rows(), 1>(tile, row, k, channel, lanes, add, out);
    });
  };
  int64_t row = tile.row;
  for (; row + ROWS <= tile.row_end; row += ROWS) {
    sum_rows(row, std::integral_constant<int64_t, ROWS>{});
  }
  for (; row < tile.row_end; ++row) sum_rows(row, std::integral_constant<int64_t, 1>{});
}

/// Reduces SUMS sums over a whole matrix of T: tiles into the workspace, then the tiles in order.
/// `make(vectors)` is the tile's add. Tiles are WIDTH channels wide, narrower if threads would have
/// none.
template <class T, int64_t ROWS, int64_t WIDTH, int SUMS, int COUNT, class Make>
void reduce(int64_t npq, int64_t k, float* workspace, const float* const (&vectors)[COUNT],
            const Make& make, float* const (&out)[SUMS]) {
  Tiles tiles{npq, k, WIDTH};
  if (tiles.row_blocks() < omp_get_max_threads()) tiles.width = BLOCK_K;
  const int64_t plane = tiles.row_blocks() * padded(k);
  for_each_tile(tiles, [&](const Tile& tile) {
    const Channels<T, COUNT, WIDTH> channels(vectors, tile.channel, tile.channel_end);
    float* partial[SUMS];
    for (int s = 0; s < SUMS; ++s) {
      partial[s] = workspace + s * plane + tile.index * padded(k) + tile.channel;
    }
    sum_tile<T, ROWS>(tile, k, make(channels), partial);
  });
  merge_sums<T>(tiles.row_blocks(), k, workspace, out);
}

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

/// Where z, as it was written, lets a gradient pass.
template <class T>
struct GateByActivation {
  const T* z;

  template <class Lanes>
  Pack<T> operator()(const Pack<T>& dz, const At& at, Lanes lanes) const {
    return where_active(load_ahead(z + at.offset, at.ahead, lanes), dz);
  }
};

/// The same from the bits that affine_act left.
template <class T>
struct GateByMask {
  const uint8_t* mask;
  int64_t mask_k;

  template <class Lanes>
  Pack<T> operator()(const Pack<T>& dz, const At& at, Lanes lanes) const {
    return where_bits(load_mask(mask + at.row * mask_k, at.channel, lanes), dz);
  }
};

// g = dz where z > 0 else 0;  sum_g = sum(g);  sum_gy = sum(g * (y - mean));  sum_gry likewise
// Shapes    dz, z, y, ry, g (NPQ, K) channels-last; mask (NPQ, ceil(K / 8)) bytes; mean, rmean,
//           sums (K,) fp32; workspace (SUMS, row blocks, padded(K)) fp32
// Tiles     as bn_stats, but whole rows of up to WRITE_K channels
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
  const auto make = [=](const auto& vectors) {
    return [=, &vectors](const At& at, auto lanes, Vec(&sums)[SUMS][2]) {
      const Pack<T> stored = gate(load_ahead(dz + at.offset, at.ahead, lanes), at, lanes);
      store_pack(g + at.offset, stored, lanes);
      const Pair gradient = widen(stored),
                 value = widen(load_ahead(y + at.offset, at.ahead, lanes));
      for (int h = 0; h < 2; ++h) {
        sums[0][h] += gradient.v[h];
        sums[1][h] = fma(gradient.v[h], value.v[h] - vectors(0, at.local, h), sums[1][h]);
      }
      if constexpr (SUMS == 3) {
        const Pair r = widen(load_ahead(ry + at.offset, at.ahead, lanes));
        for (int h = 0; h < 2; ++h) {
          sums[2][h] = fma(gradient.v[h], r.v[h] - vectors(1, at.local, h), sums[2][h]);
        }
      }
    };
  };
  const float* const means[] = {args.mean, args.rmean};
  if (args.k * static_cast<int64_t>(sizeof(T)) >= WRITE_BYTES) {
    reduce<T, 1, WRITE_K>(args.npq, args.k, args.workspace, means, make, out);
  } else {
    reduce<T, WRITE_ROWS, BLOCK_K>(args.npq, args.k, args.workspace, means, make, out);
  }
}

/// g of a gradient dz that comes without a ReLU: itself.
template <class T>
struct Gradient {
  const T* dz;

  template <int SCALE, class Lanes, class Vectors>
  Pair of(const Pair&, const At& at, Lanes lanes, const Vectors&) const {
    return widen(load_ahead(dz + at.offset, at.ahead, lanes));
  }
};

/// g behind a ReLU whose output was not kept: the mask is recomputed as affine_act computed it,
/// from the vectors number SCALE and SCALE + 1.
template <class T>
struct MaskedGradient {
  const T* dz;

  template <int SCALE, class Lanes, class Vectors>
  Pair of(const Pair& y, const At& at, Lanes lanes, const Vectors& vectors) const {
    Pair g = widen(load_ahead(dz + at.offset, at.ahead, lanes));
    for (int h = 0; h < 2; ++h) {
      const Vec scale = vectors(SCALE, at.local, h), shift = vectors(SCALE + 1, at.local, h);
      g.v[h] = where_active(fma(y.v[h], scale, shift), g.v[h]);
    }
    return g;
  }
};

// sum_g = sum(g);  sum_gy = sum(g * (y - mean));  g = dz where y * scale + shift > 0 else 0
// Shapes    dz, y (NPQ, K) channels-last; mean, scale, shift, sums (K,) fp32; workspace (2, row
//           blocks, padded(K)) fp32
// Tiles     as bn_stats
// Traffic   reads dz, y: 2 * NPQ * K * itemsize
// Numerics  fp32 sums over a tile, tiles merged in double, in order
// Source    ops.bn_backward_sums; docs/bn_act.md
template <class T, class G>
void bn_backward_sums_kernel(const BnBackwardSums& args, T, G g) {
  const T* y = static_cast<const T*>(args.y);
  const auto make = [=](const auto& vectors) {
    return [=, &vectors](const At& at, auto lanes, Vec(&sums)[2][2]) {
      const Pair value = widen(load_ahead(y + at.offset, at.ahead, lanes));
      const Pair gradient = g.template of<1>(value, at, lanes, vectors);
      for (int h = 0; h < 2; ++h) {
        sums[0][h] += gradient.v[h];
        sums[1][h] = fma(gradient.v[h], value.v[h] - vectors(0, at.local, h), sums[1][h]);
      }
    };
  };
  const float* const vectors[] = {args.mean, args.scale, args.shift};
  reduce<T, READ_ROWS, BLOCK_K, 2>(args.npq, args.k, args.workspace, vectors, make,
                                   {args.sum_g, args.sum_gy});
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
  const auto body = [=](const At& at, auto lanes, const auto& vectors) {
    const Pair value = widen(load_pack(y + at.offset, lanes));
    Pair result = g.template of<4>(value, at, lanes, vectors);
    for (int h = 0; h < 2; ++h) {
      const Vec centred = value.v[h] - vectors(0, at.local, h);
      const Vec rest = fma(vectors(2, at.local, h), centred, vectors(3, at.local, h));
      result.v[h] = fma(vectors(1, at.local, h), result.v[h], rest);
    }
    store_pack(dy + at.offset, narrow(result, T{}), lanes);
  };
  for_each_element<T>(args.npq, args.k, {args.mean, args.a, args.b, args.c, args.scale, args.shift},
                      body);
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
      f(type, MaskedGradient<decltype(type)>{dz});
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
      affine_act_kernel(args, type, AffineResidual<T>{residual});
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
      affine_act_backward(args, type, GateByMask<T>{args.mask, cdiv(args.k, 8)});
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
