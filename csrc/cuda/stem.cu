// The stem behind its convolution: BatchNorm, ReLU and max-pooling (3 x 3, stride 2, padding 1) in
// one pass, and their backward: the twin of cpu/stem.cpp. Arithmetic is fp32 whatever the storage.
// Not yet run on a GPU.
//
// All kernels walk alike. A window (p, q) and the four positions of y that it begins, rows 2p and
// 2p + 1 and columns 2q and 2q + 1, make a cell; a thread keeps its WIDTH channels and its column
// of cells, and goes down at most SEGMENT of them. What the next cell needs of this one stays in
// registers; what the column to the right needs is read by both threads, which are neighbours in
// one warp or block and read it at nearly the same time: the second finds it in L1.
#include "reduce.cuh"

namespace resnet_fast::cuda {
namespace {

// Cells of a walk. The forward reads one row of y more than its own at the start of each: 1 in 16,
// and mostly from L2, since the walk above is under way at the same time.
constexpr int SEGMENT = 8;
// Of the nine places in a window the index of none: z is 0.
constexpr int BLOCKED = 9;

/// The images, and how they are cut into walks: image, segment of rows, column, the last fastest.
struct Cells {
  int h, w, p, q, segments;
  int64_t walks;

  template <class Args>
  explicit Cells(const Args& args)
      : h(static_cast<int>(args.h)),
        w(static_cast<int>(args.w)),
        p((h + 1) / 2),
        q((w + 1) / 2),
        segments(static_cast<int>(cdiv(p, SEGMENT))),
        walks(args.n * segments * q) {}
};

/// One walk: cells (first_p, q) to (last_p - 1, q). Its offsets are of channel 0.
struct Walk {
  int first_p, last_p, q;
  int64_t window, position;

  __device__ Walk(const Cells& cells, int64_t number, int64_t k) {
    const int64_t segment = number / cells.q, image = segment / cells.segments;
    q = static_cast<int>(number % cells.q);
    first_p = static_cast<int>(segment % cells.segments) * SEGMENT;
    last_p = min(first_p + SEGMENT, cells.p);
    window = ((image * cells.p + first_p) * cells.q + q) * k;
    position = ((image * cells.h + 2 * first_p) * cells.w + 2 * q) * k;
  }
};

// ---- Forward

/// A value as stored and its rank in the window, as one integer of which the larger wins: the
/// larger value, and of equal ones the first. As a signed integer a float that is not negative
/// keeps its order, NaN without a sign is above all, and what is negative is below 0: so the ReLU
/// is a 0 that takes part.
template <class T>
struct Candidate {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  using Unsigned = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;
  using Key = std::make_signed_t<Unsigned>;
  static constexpr int SHIFT = 8 * sizeof(T);
  static constexpr int FIRST = 8;  // the rank of the first place

  __device__ static Key key(float value, int rank) {
    // The conversion to 16 bits makes but one NaN, 0x7fff.
    if (sizeof(T) == 4 && value != value) value = __uint_as_float(0x7fffffff);
    T stored;
    store_float(stored, value);
    Bits bits;
    memcpy(&bits, &stored, sizeof bits);
    return static_cast<Key>(Unsigned{bits} << SHIFT | static_cast<unsigned>(rank));
  }

  __device__ static Bits value(Key key) {
    return static_cast<Bits>(static_cast<Unsigned>(key) >> SHIFT);
  }

  __device__ static uint8_t index(Key key) {
    return static_cast<uint8_t>(key <= FIRST ? BLOCKED : FIRST - static_cast<int>(key & 15));
  }
};

/// Three neighbours in a row of y, and the largest of what they become.
template <class T, int WIDTH>
struct RowOfThree {
  using Key = typename Candidate<T>::Key;
  Pack<T, WIDTH> column[3];

  __device__ RowOfThree(const T* centre, int64_t left, int64_t right)
      : column{load_pack<WIDTH>(centre + left), load_pack<WIDTH>(centre),
               load_pack<WIDTH>(centre + right)} {}

  /// The ranks are those of the left and centre column; the right one comes next.
  __device__ void raise(Key (&best)[WIDTH], const Channels<WIDTH>& scale,
                        const Channels<WIDTH>& shift, int left_rank, int rank) const {
    const int ranks[3] = {left_rank, rank, rank - 1};
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float value = affine(load_float(column[s].value[i]), scale[i], shift[i]);
        const Key key = Candidate<T>::key(value, ranks[s]);
        best[i] = key > best[i] ? key : best[i];
      }
    }
  }
};

// z = max over windows of relu(y * scale + shift);  index = 3 * r + s of the winner
// Shapes    y (N, H, W, K), z and index (N, P, Q, K) channels-last; scale, shift (K,) fp32
// Tiles     a block per lanes * WIDTH channels x THREADS / lanes walks, each of SEGMENT windows
// Traffic   reads y, N * H * W * K * itemsize, once from HBM and 1.5 times from L1: a row's maxima
//           serve both windows that it is in, columns are shared by neighbours; writes z and index,
//           N * P * Q * K * (itemsize + 1)
// Numerics  fp32 to the rounding, to storage; compared as stored, which is exact
// Source    ops.affine_act_maxpool
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS, 3)
    affine_act_maxpool_kernel(const T* y, const float* scale_, const float* shift_, T* z,
                              uint8_t* index, Cells cells, int64_t k, int64_t block_walks,
                              unsigned channel_blocks) {
  using Bits = typename Candidate<T>::Bits;
  using Key = typename Candidate<T>::Key;
  const Place at = place<WIDTH>(cells.walks, block_walks, channel_blocks);
  if (at.channel >= k) return;
  const Channels<WIDTH> scale(scale_, at.channel), shift(shift_, at.channel);
  for (int64_t number = at.first_row; number < at.last_row; number += blockDim.y) {
    const Walk walk(cells, number, k);
    const int64_t row = cells.w * k;
    // A neighbour that is not there is replaced by one that is, at no higher rank: no difference.
    const bool no_left = walk.q == 0;
    const int64_t left = no_left ? 0 : -k, right = 2 * walk.q + 1 < cells.w ? k : 0;
    const T* centre = y + walk.position + at.channel;
    int64_t to = walk.window + at.channel;

    Key first[WIDTH] = {};  // of the row above, as r = 0
    if (walk.first_p > 0) {
      RowOfThree<T, WIDTH>(centre - row, left, right).raise(first, scale, shift, 8 - no_left, 7);
    }
    for (int p = walk.first_p; p < walk.last_p; ++p, centre += 2 * row, to += cells.q * k) {
      const T* below = 2 * p + 1 < cells.h ? centre + row : centre;
      const RowOfThree<T, WIDTH> second(centre, left, right), third(below, left, right);
      Key best[WIDTH] = {}, next[WIDTH] = {};
      second.raise(best, scale, shift, 5 - no_left, 4);
      third.raise(next, scale, shift, 2 - no_left, 1);
      Pack<Bits, WIDTH> value;
      Pack<uint8_t, WIDTH> place;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (first[i] > best[i]) best[i] = first[i];
        if (next[i] > best[i]) best[i] = next[i];
        first[i] = next[i] + 6;  // r = 2 here is r = 0 of the next window
        value.value[i] = Candidate<T>::value(best[i]);
        place.value[i] = Candidate<T>::index(best[i]);
      }
      store_pack(reinterpret_cast<Bits*>(z) + to, value);
      store_pack(index + to, place);
    }
  }
}

// ---- Backward

/// A Pack that is kept as words: what a loop carries as elements would take a register for each.
template <class T, int N>
struct Words {
  using Bits = std::conditional_t<sizeof(T) == 1, uint8_t,
                                  std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>>;
  using Word = std::conditional_t<sizeof(T) * N % 4 == 0, uint32_t, Bits>;
  static constexpr int SHARERS = sizeof(Word) / sizeof(T);
  Pack<Word, N / SHARERS> words;

  explicit __device__ Words(const T* p)
      : words(load_pack<N / SHARERS>(reinterpret_cast<const Word*>(p))) {}

  __device__ T operator[](int i) const {
    const Bits bits = static_cast<Bits>(words.value[i / SHARERS] >> i % SHARERS * 8 * sizeof(T));
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

/// What a window sends back: dz, and whither.
template <class T, int WIDTH>
struct Winners {
  Words<T, WIDTH> dz;
  Words<uint8_t, WIDTH> index;

  __device__ Winners(const T* from, const uint8_t* from_index, int64_t offset)
      : dz(from + offset), index(from_index + offset) {}

  /// dz of channel i where the winner stands at `place`, else 0.
  __device__ float at(int place, int i) const {
    return index[i] == place ? load_float(dz[i]) : 0.0f;
  }
};

/// Calls body(offset, y, gradient) on every position of the walks, where gradient(i) is g: the sum
/// over the windows that hold the position, of which there are 1, 2 or 4. In the place of a window
/// or position that is not there the one beside it is loaded, and no index is NOWHERE.
template <class T, int WIDTH, class Body>
__device__ inline void for_each_position(const T* dz, const uint8_t* index, const T* y,
                                         const Cells& cells, const Place& at, int64_t k,
                                         Body& body) {
  constexpr int NOWHERE = 255;
  for (int64_t number = at.first_row; number < at.last_row; number += blockDim.y) {
    const Walk walk(cells, number, k);
    const bool right = walk.q + 1 < cells.q, odd_column = 2 * walk.q + 1 < cells.w;
    const int64_t next_window = right ? k : 0, next_column = odd_column ? k : 0;
    const int right_3 = right ? 3 : NOWHERE, right_6 = right ? 6 : NOWHERE;
    int64_t window = walk.window + at.channel, offset = walk.position + at.channel;

    Winners<T, WIDTH> upper(dz, index, window), upper_right(dz, index, window + next_window);
    for (int p = walk.first_p; p < walk.last_p; ++p) {
      const bool odd_row = 2 * p + 1 < cells.h, below = p + 1 < cells.p;
      const int64_t row = cells.w * k;
      const int below_1 = below ? 1 : NOWHERE, below_2 = below ? 2 : NOWHERE;
      const int below_0 = below && right ? 0 : NOWHERE;
      if (below) window += cells.q * k;
      const Winners<T, WIDTH> lower(dz, index, window);
      const Winners<T, WIDTH> lower_right(dz, index, window + next_window);
      const T* from = y + offset;
      const Pack<T, WIDTH> y00 = load_pack<WIDTH>(from), y01 = load_pack<WIDTH>(from + next_column);
      if (odd_row) from += row;
      const Pack<T, WIDTH> y10 = load_pack<WIDTH>(from), y11 = load_pack<WIDTH>(from + next_column);

      body(offset, y00, [&](int i) { return upper.at(4, i); });
      if (odd_column) {
        body(offset + k, y01, [&](int i) { return upper.at(5, i) + upper_right.at(right_3, i); });
      }
      if (odd_row) {
        body(offset + row, y10, [&](int i) { return upper.at(7, i) + lower.at(below_1, i); });
      }
      if (odd_row && odd_column) {
        body(offset + row + k, y11, [&](int i) {
          return upper.at(8, i) + upper_right.at(right_6, i) + lower.at(below_2, i) +
                 lower_right.at(below_0, i);
        });
      }
      offset += 2 * row;
      upper = lower;
      upper_right = lower_right;
    }
  }
}

template <class T, int WIDTH>
struct MaxpoolBackwardSumsBody {
  Channels<WIDTH> mean;
  float (&sums)[2][WIDTH];

  template <class Gradient>
  __device__ void operator()(int64_t, const Pack<T, WIDTH>& y, Gradient gradient) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float g = gradient(i);
      sums[0][i] += g;
      sums[1][i] = __fmaf_rn(g, load_float(y.value[i]) - mean[i], sums[1][i]);
    }
  }
};

// sum_g = sum(g);  sum_gy = sum(g * (y - mean));  g = the sum of the dz whose index points there
// Shapes    dz, index (N, P, Q, K), y (N, H, W, K) channels-last; mean (K,) fp32;
//           workspace (2, row blocks, K) fp32
// Tiles     a block per lanes * WIDTH channels x block_walks walks, each of SEGMENT cells
// Traffic   reads y, N * H * W * K * itemsize, and dz and index, N * P * Q * K * (itemsize + 1),
//           once from HBM; dz and index twice from L1, for the column to the right
// Numerics  fp32 sums over a block, blocks merged in double, in order
// Source    ops.maxpool_backward_sums
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    maxpool_backward_sums_kernel(const T* dz, const uint8_t* index, const T* y, const float* mean,
                                 float* workspace, Cells cells, int64_t k, int64_t block_walks,
                                 int64_t row_blocks, unsigned channel_blocks) {
  const Place at = place<WIDTH>(cells.walks, block_walks, channel_blocks);
  float sums[2][WIDTH] = {};
  if (at.channel < k) {
    MaxpoolBackwardSumsBody<T, WIDTH> body{{mean, at.channel}, sums};
    for_each_position<T, WIDTH>(dz, index, y, cells, at, k, body);
  }
  finish_block(sums, at, k, row_blocks, workspace);
}

template <class T, int WIDTH>
struct MaxpoolBackwardApplyBody {
  T* dy;
  Channels<WIDTH> mean, a, b, c;

  template <class Gradient>
  __device__ void operator()(int64_t offset, const Pack<T, WIDTH>& y, Gradient gradient) const {
    Pack<T, WIDTH> out;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float centred = load_float(y.value[i]) - mean[i];
      store_float(out.value[i], __fmaf_rn(a[i], gradient(i), __fmaf_rn(b[i], centred, c[i])));
    }
    store_pack(dy + offset, out);
  }
};

// dy = a * g + b * (y - mean) + c;  g = the sum of the dz whose index points there
// Shapes    dz, index (N, P, Q, K), y, dy (N, H, W, K) channels-last; mean, a, b, c (K,) fp32
// Tiles     as affine_act_maxpool
// Traffic   as maxpool_backward_sums, and writes dy, N * H * W * K * itemsize
// Numerics  fp32 from load to store; one rounding, at the store
// Source    ops.maxpool_backward_apply
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    maxpool_backward_apply_kernel(const T* dz, const uint8_t* index, const T* y, const float* mean,
                                  const float* a, const float* b, const float* c, T* dy,
                                  Cells cells, int64_t k, int64_t block_walks,
                                  unsigned channel_blocks) {
  const Place at = place<WIDTH>(cells.walks, block_walks, channel_blocks);
  if (at.channel >= k) return;
  MaxpoolBackwardApplyBody<T, WIDTH> body{
      dy, {mean, at.channel}, {a, at.channel}, {b, at.channel}, {c, at.channel}};
  for_each_position<T, WIDTH>(dz, index, y, cells, at, k, body);
}

}  // namespace

void affine_act_maxpool(const AffineActMaxpool& args) {
  if (args.n * args.h * args.w == 0) return;
  visit_device(args.dtype, [&](auto type) {
    using T = decltype(type);
    visit_width<T>(aligned(args.k, args.y, args.z, args.index), [&](auto width) {
      const Layout layout(args.k, width);
      const Cells cells(args);
      const int64_t block_walks = layout.rows();
      launch(affine_act_maxpool_kernel<T, width()>, layout.grid(cdiv(cells.walks, block_walks)),
             layout.block(), 0, args.stream, static_cast<const T*>(args.y), args.scale, args.shift,
             static_cast<T*>(args.z), args.index, cells, args.k, block_walks,
             layout.channel_blocks);
    });
  });
}

void maxpool_backward_sums(const MaxpoolBackwardSums& args) {
  // The workspace has room for so many row blocks.
  const int64_t room = RowBlocks(args.n * args.h * args.w, args.k).count;
  int64_t row_blocks = 0;
  if (room > 0) {
    visit_device(args.dtype, [&](auto type) {
      using T = decltype(type);
      visit_width<T>(aligned(args.k, args.dz, args.index, args.y), [&](auto width) {
        const Layout layout(args.k, width);
        const Cells cells(args);
        const int64_t block_walks = cdiv(cdiv(cells.walks, room), layout.rows()) * layout.rows();
        row_blocks = cdiv(cells.walks, block_walks);
        launch(maxpool_backward_sums_kernel<T, width()>, layout.grid(row_blocks), layout.block(), 0,
               args.stream, static_cast<const T*>(args.dz), args.index,
               static_cast<const T*>(args.y), args.mean, args.workspace, cells, args.k, block_walks,
               row_blocks, layout.channel_blocks);
      });
    });
  }
  finish_sums(2, args.workspace, {{args.sum_g, args.sum_gy, nullptr}}, args.k, row_blocks,
              args.stream);
}

void maxpool_backward_apply(const MaxpoolBackwardApply& args) {
  if (args.n * args.h * args.w == 0) return;
  visit_device(args.dtype, [&](auto type) {
    using T = decltype(type);
    visit_width<T>(aligned(args.k, args.dz, args.index, args.y, args.dy), [&](auto width) {
      const Layout layout(args.k, width);
      const Cells cells(args);
      const int64_t block_walks = layout.rows();
      launch(maxpool_backward_apply_kernel<T, width()>, layout.grid(cdiv(cells.walks, block_walks)),
             layout.block(), 0, args.stream, static_cast<const T*>(args.dz), args.index,
             static_cast<const T*>(args.y), args.mean, args.a, args.b, args.c,
             static_cast<T*>(args.dy), cells, args.k, block_walks, layout.channel_blocks);
    });
  });
}

}  // namespace resnet_fast::cuda
