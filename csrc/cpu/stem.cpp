// The stem behind its convolution: BatchNorm, ReLU and max-pooling 3 x 3, stride 2, padding 1, in
// one pass on the CPU. The activation is never written. Its backward: stem_backward.cpp.
//
// Compiled once per instruction set, as bn_act.cpp. Arithmetic is fp32 whatever the storage.
#include "isa.h"
#include "windows.h"

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

// Of each task's rows of windows the one before the first is read, too. A task has at least this
// many, and more where there are this many tasks.
constexpr int64_t BLOCK_P = 8;
constexpr int64_t TASKS = 32;

/// max(value, 0) for comparing: its bits are in order as integers, NaN above all, and 0 has no
/// sign.
RESNET_FAST_INLINE Vec ordered_relu(Vec value) {
#if defined(__AVX512F__)
  // A nibble for each class, from the lowest: quiet NaN, NaN, 0, 1, -Inf, Inf, < 0, > 0. The value
  // itself is 1, +0 is 8. The order is that of unsigned integers.
  return _mm512_maskz_fixupimm_ps(ALL_LANES, value, value, _mm512_set1_epi32(0x18181811), 0);
#else
  return (Vec)((VecBits)relu(value) & 0x7fffffff);
#endif
}

/// The largest value of a part of a window as it is stored, and its place. Every value comes from
/// ordered_relu. What lies outside the image is 0 and comes first nowhere but before another 0,
/// whose place does not matter.
template <class T>
struct Best {
  using S = Storage<T>;
  using Part = typename S::Part;
  using Bits = typename S::Bits;
#if defined(__AVX512F__)
  using Order = Part;
#else
  using Order = typename S::Signed;
#endif

  Pack<T> value, place;

  /// Of one row of a window: places 0, 1, 2.
  static Best of(const Pack<T>& left, const Pack<T>& middle, const Pack<T>& right) {
    Best best;
    for (int i = 0; i < S::PARTS; ++i) {
      const Part l = left.v[i], m = middle.v[i], r = right.v[i];
      const auto second = (Order)m > (Order)l;
      const Part two = second ? m : l, place = second ? Part{} + Bits{1} : Part{};
      const auto third = (Order)r > (Order)two;
      best.value.v[i] = third ? r : two;
      best.place.v[i] = third ? Part{} + Bits{2} : place;
    }
    return best;
  }

  /// The larger; `later` comes `by` places behind this in the window.
  Best or_later(const Best& later, Bits by) const {
    Best best;
    for (int i = 0; i < S::PARTS; ++i) {
      const auto wins = (Order)later.value.v[i] > (Order)value.v[i];
      best.value.v[i] = wins ? later.value.v[i] : value.v[i];
      best.place.v[i] = wins ? later.place.v[i] + by : place.v[i];
    }
    return best;
  }

  /// The value as it is stored.
  Pack<T> stored() const {
    Pack<T> result = value;
    for (Part& part : result.v) part &= Bits{S::SIGN - 1};
    return result;
  }

  Pack<T> index() const {
    Pack<T> index;
    for (int i = 0; i < S::PARTS; ++i) {
      index.v[i] = value.v[i] == 0 ? Part{} + Bits{BLOCKED} : place.v[i];
    }
    return index;
  }
};

// z = max of relu(y * scale + shift) over 3 x 3;  index = its place, or 9 where z is not > 0
// Shapes    y (N, H, W, K), z, index (N, P, Q, K) channels-last; scale, shift (K,) fp32
// Tiles     BLOCK_P x BLOCK_Q windows of one image, shared out to the threads; in each, groups of
//           PACKS packs of channels
// Traffic   reads y, writes z, index: NHWK * itemsize + NPQK * (itemsize + 1). The maxima of an odd
//           row are kept for the windows below it, the values of an odd column for those to its
//           right, so that each value is transformed once
// Numerics  fp32 multiply-add, rounded to the storage type, then compared; NaN wins
// Source    ops.affine_act_maxpool; docs/bn_act.md
template <class T, int COUNT, class Lanes>
void affine_act_maxpool_tile(const AffineActMaxpool& args, const Images& images,
                             const Windows& block, int64_t channel, Lanes lanes) {
  const int64_t k = args.k, w = images.w, h = images.h;
  const T* y = static_cast<const T*>(args.y) + block.image * h * w * k + channel;
  T* z = static_cast<T*>(args.z) + block.image * images.p * images.q * k + channel;
  uint8_t* index = args.index + block.image * images.p * images.q * k + channel;
  const Group<T, 2> vectors({args.scale, args.shift}, channel, smaller(channel + COUNT * PACK, k));
  // An activation as it is compared.
  const auto value = [&](const T* at, int v) {
    Pair pair = widen(load_pack(at + v * PACK, lanes));
    for (int i = 0; i < 2; ++i) {
      pair.v[i] = ordered_relu(fma(pair.v[i], vectors(0, v * PACK, i), vectors(1, v * PACK, i)));
    }
    return narrow(pair, T{});
  };
  // The best of a row's three columns, of which `at` is the middle; `left`, the last column of the
  // window before, moves on.
  const auto row_best = [&](const T* at, bool has_right, int v, Pack<T>& left) {
    const Pack<T> middle = value(at, v), right = has_right ? value(at + k, v) : Pack<T>{};
    const Best<T> best = Best<T>::of(left, middle, right);
    left = right;
    return best;
  };
  const auto row_at = [&](int64_t row) { return y + (row * w + 2 * block.q) * k; };
  const auto column_before = [&](int64_t row, Pack<T>(&left)[COUNT]) {
    for (int v = 0; v < COUNT; ++v) left[v] = block.q > 0 ? value(row_at(row) - k, v) : Pack<T>{};
  };

  Best<T> above[BLOCK_Q][COUNT] = {};  // of row 2p - 1
  Pack<T> left[COUNT], lower_left[COUNT] = {};
  if (block.p > 0) {
    const T* at = row_at(2 * block.p - 1);
    column_before(2 * block.p - 1, left);
    for (int64_t q = block.q; q < block.q_end; ++q, at += 2 * k) {
      for (int v = 0; v < COUNT; ++v) {
        above[q - block.q][v] = row_best(at, 2 * q + 1 < w, v, left[v]);
      }
    }
  }
  for (int64_t p = block.p; p < block.p_end; ++p) {
    const bool has_below = 2 * p + 1 < h;
    const T* at = row_at(2 * p);
    int64_t offset = (p * images.q + block.q) * k;
    column_before(2 * p, left);
    if (has_below) column_before(2 * p + 1, lower_left);
    for (int64_t q = block.q; q < block.q_end; ++q, at += 2 * k, offset += k) {
      const bool has_right = 2 * q + 1 < w;
      for (int v = 0; v < COUNT; ++v) {
        Best<T>& top = above[q - block.q][v];
        Best<T> best = top.or_later(row_best(at, has_right, v, left[v]), 3);
        if (has_below) {
          top = row_best(at + w * k, has_right, v, lower_left[v]);
          best = best.or_later(top, 6);
        }
        store_pack(z + offset + v * PACK, best.stored(), lanes);
        store_bytes(index + offset + v * PACK, best.index(), lanes);
      }
    }
  }
}

template <class T>
void affine_act_maxpool_kernel(const AffineActMaxpool& args) {
  const Images images(args);
  const int64_t k = args.k, across = cdiv(images.q, BLOCK_Q), columns = images.n * across;
  if (columns * images.p == 0) return;
  const int64_t parts = smaller(cdiv(TASKS, columns), cdiv(images.p, BLOCK_P));
  const int64_t height = cdiv(images.p, parts), down = cdiv(images.p, height);
  const int64_t count = columns * down;
#pragma omp parallel for schedule(static) if (images.n * images.h * images.w * k > SERIAL)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = i / across % down * height, q = i % across * BLOCK_Q;
    const Windows block{i / across / down, p, smaller(p + height, images.p), q,
                        smaller(q + BLOCK_Q, images.q)};
    for_each_group(k, [&](int64_t channel, auto packs, auto lanes) {
      affine_act_maxpool_tile<T, packs()>(args, images, block, channel, lanes);
    });
  }
}

void affine_act_maxpool(const AffineActMaxpool& args) {
  visit(args.dtype, [&](auto type) { affine_act_maxpool_kernel<decltype(type)>(args); });
}

}  // namespace

const Stem stem = {affine_act_maxpool};

}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
