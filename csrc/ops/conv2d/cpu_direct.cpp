// y = conv(x) + bias + add + residual, directly: for each tap of the kernel a matrix product (gemm.h) in which a row of
// A is the pixel that the tap sees, where it lies. What it sees outside the image is a row of zeros.
//
// A work item is a block of pixels and a block of columns. Its products take at most kChain channels at a time, so that
// their weights stay in the L2 cache while the block's pixels go by, and no chain of additions is longer. Few channels
// make up for it by several taps in one product.
// The order of an element's sum depends on the channels and the taps alone, so that blocks may be cut as is convenient.

#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kChain = 384;
constexpr int64_t kMaxTaps = 9;
alignas(64) constexpr float kZeros[kChain] = {};

struct Block {
  int64_t first, pixels;    // of all samples' in a row
  int64_t column, columns;  // of the output's channels
};

// Whatever is larger, the weights or the image, is read once; the other comes out of a cache again and again.
Block block_of(const ConvParams& p, int64_t item) {
  const bool weights_once = p.matrices * p.out_channels > p.samples * p.height * p.width;
  const int64_t most = p.direct_pixels(), blocks = (p.pixels() + most - 1) / most;
  const int64_t first = (weights_once ? item % blocks : item / p.direct_columns()) * most;
  const int64_t column = (weights_once ? item / blocks : item % p.direct_columns()) * kDirectColumns;
  return {first, min(most, p.pixels() - first), column, min(kDirectColumns, p.out_channels - column)};
}

// y = add + residual
void start(const ConvParams& p, const Block& block) {
  for (int64_t i = block.first; i < block.first + block.pixels; ++i) {
    const float* add = p.add ? p.add + i / (p.out_height * p.out_width) * p.add_stride : nullptr;
    for (int64_t c = 0; c < block.columns; c += kLanes) {
      const int64_t k = block.column + c;
      const int count = int(min(kLanes, block.columns - c));
      f32v y{};
      if (add) y = load(add + k, count);
      if (p.residual) y = y + load(static_cast<const float*>(p.residual) + i * p.out_channels + k, count);
      store(static_cast<float*>(p.y) + i * p.out_channels + k, y, count);
    }
  }
}

// Finds the rows that a tap reads for the block's pixels: rows[i] is channel `channel` of x[source], or zeros outside the image.
void find_rows(const ConvParams& p, const Block& block, int64_t tap, int source, int64_t channel, const float** rows) {
  const int64_t side = p.matrices == 9 ? 3 : 1, channels = p.channels[source];
  const int64_t height = p.height << p.upsample, width = p.width << p.upsample;
  const int64_t above = p.padding - tap / side, left = p.padding - tap % side;
  // Columns of the output from which the tap sees a pixel, and from which it does so no more.
  const int64_t enter = left > 0 ? (left + p.stride - 1) / p.stride : 0;
  const int64_t leave = (width + left + p.stride - 1) / p.stride;
  int64_t column = block.first % p.out_width, row = block.first / p.out_width % p.out_height;
  int64_t sample = block.first / (p.out_width * p.out_height);
  for (int64_t i = 0; i < block.pixels; column = 0) {
    const int64_t h = row * p.stride - above, start = i - column;  // start: where column 0 would be
    const int64_t end = block.pixels - start < p.out_width ? block.pixels : start + p.out_width;
    const bool inside = 0 <= h && h < height;
    const int64_t first = inside ? min(max(start + enter, i), end) : end, last = max(first, min(start + leave, end));
    const float* line = static_cast<const float*>(p.x[source]) + channel +
                        (sample * p.height + (h >> p.upsample)) * p.width * channels;
    for (; i < first; ++i) rows[i] = kZeros;
    for (; i < last; ++i) rows[i] = line + (((i - start) * p.stride - left) >> p.upsample) * channels;
    for (; i < end; ++i) rows[i] = kZeros;
    if (++row == p.out_height) row = 0, ++sample;
  }
}

// C = A B + bias, or C + A B + bias, for B with its columns one after another: registers lie along the depth, so that
// few columns leave none half empty.
template <int columns>
void multiply_few_columns(const Product& p, int64_t b_column) {
  constexpr int rows = kTileRegisters == 4 ? 6 : 3;  // rows x columns of sums and a column fit into the registers
  for (int64_t row = 0; row < p.rows; row += rows) {
    f32v sum[rows][columns] = {};
    for (int64_t part = 0; part < p.parts; ++part) {
      const float *a[rows], *b = p.b + part * p.b_part;
      for (int r = 0; r < rows; ++r) a[r] = p.row_of_a(part, min(row + r, p.rows - 1));
      const auto step = [&](int64_t k, auto... count) __attribute__((always_inline)) {
        f32v b_k[columns];
        for (int v = 0; v < columns; ++v) b_k[v] = load(b + v * b_column + k, count...);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          const f32v a_rk = load(a[r] + k, count...);
#pragma GCC unroll 4
          for (int v = 0; v < columns; ++v) sum[r][v] = multiply_add(a_rk, b_k[v], sum[r][v]);
        }
      };
      int64_t k = 0;
      for (; k + kLanes <= p.depth; k += kLanes) step(k);
      if (k < p.depth) step(k, int(p.depth - k));
    }
    for (int64_t r = 0; r < min(rows, p.rows - row); ++r)
      for (int v = 0; v < columns; ++v) {
        float& c = p.c[(row + r) * p.c_row + v];
        c = (p.add ? c : 0.0f) + (p.bias ? p.bias[v] : 0.0f) + reduce_add(sum[r][v]);
      }
  }
}

void multiply_few_columns(const Product& p, int64_t b_column) {
  switch (p.columns) {
    case 1: return multiply_few_columns<1>(p, b_column);
    case 2: return multiply_few_columns<2>(p, b_column);
    case 3: return multiply_few_columns<3>(p, b_column);
    case 4: return multiply_few_columns<4>(p, b_column);
  }
}

void convolve(const ConvParams& p, const Block& block) {
  const float* rows[kMaxTaps * kDirectPixels];
  const bool few = p.few_columns();
  const int64_t depth = p.depth(), fit = few ? kMaxTaps : max(kChain / depth, 1);
  const int64_t tap_stride = (few ? p.out_channels : p.direct_columns() * kDirectColumns) * depth;
  const int64_t b_depth = few ? 1 : kDirectColumns;
  bool started = p.add || p.residual;
  if (started) start(p, block);
  for (int64_t tap = 0; tap < p.matrices; tap += fit) {
    const int64_t taps = min(fit, p.matrices - tap);
    const float* weight = static_cast<const float*>(p.weight) + tap * tap_stride + block.column * depth;
    for (int source = 0; source < 2; ++source)
      for (int64_t c = 0; c < p.channels[source]; c += kChain) {
        for (int64_t t = 0; t < taps; ++t) find_rows(p, block, tap + t, source, c, rows + t * block.pixels);
        const Product product{
            .rows = block.pixels, .columns = block.columns, .depth = min(kChain, p.channels[source] - c),
            .a = nullptr, .a_row = 0, .a_depth = 1,
            .b = weight + (source * p.channels[0] + c) * b_depth, .b_depth = b_depth,
            .c = static_cast<float*>(p.y) + block.first * p.out_channels + block.column, .c_row = p.out_channels,
            .add = started,
            .bias = p.bias && tap + source + c == 0 ? p.bias + block.column : nullptr,
            .parts = taps, .a_rows = rows, .b_part = tap_stride};
        few ? multiply_few_columns(product, depth) : multiply(product);
        started = true;
      }
  }
}

}  // namespace

void conv_direct(const ConvParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) convolve(p, block_of(p, item));
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
