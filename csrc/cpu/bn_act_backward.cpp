// The backward of BatchNorm, ReLU and residual add on the CPU: of bn_act.cpp, and compiled as it
// is. Arithmetic is fp32 whatever the storage.
#include "isa.h"
#include "passes.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

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

const BnActBackward bn_act_backward = {affine_act_backward, bn_backward_sums,
                                       bn_backward_finalize_kernel, bn_backward_apply};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
