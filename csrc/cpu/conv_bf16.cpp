// y = conv(x) + bias + add + residual: products of bfloat16, sums of float32.
//
// A work item is a block of pixels, in tiles of 16, and some panels of 32 columns. What the block's taps see of x is
// copied first, as bfloat16 and with zeros around the image, so that 16 pixels by 32 channels as one tap sees them lie
// in a row, wherever the tap and the tile are (Copy). The weight is packed in the order in which it is used. So the
// inner loop is nothing but products: of AMX tiles, of registers by vdpbf16ps, or of floats where there is neither.
//
// An element's sum goes over blocks of 32 channels, and in each over the taps: its order depends on these alone.

#include "half.h"
#include "kernels.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kDepth = kDepthBlock, kPixels = kTilePixels, kColumns = kPanel;
constexpr int64_t kMaxTaps = 9;
constexpr int64_t kCopied = 1984;  // of the copy, pixels by kDepth channels at most
constexpr int64_t kSteps = 12;     // of a sum, for which the weights of a panel fit into the L1 cache

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

struct Block {
  int64_t sample, samples, row, rows, column, columns;  // of pixels of y
  int64_t panel, panels;                                // of its channels
};

Block block_of(const ConvParams& p, const ConvBlocks& blocks, int64_t item) {
  const int64_t places = blocks.places(), place = blocks.weights_once ? item % places : item / blocks.groups;
  const int64_t panel = (blocks.weights_once ? item / places : item % blocks.groups) * blocks.panels;
  const int64_t column = place % blocks.across * blocks.columns;
  const int64_t row = place / blocks.across % blocks.down * blocks.rows;
  const int64_t sample = place / (blocks.across * blocks.down) * blocks.samples;
  return {sample, min(blocks.samples, p.samples - sample), row, min(blocks.rows, p.out_height - row),
          column, min(blocks.columns, p.out_width - column), panel, min(blocks.panels, p.panels() - panel)};
}

// --- the copy --------------------------------------------------------------------------------------------------------

// [blocks of channels, samples, row phases, column phases, rows, columns, kDepth]. Row r of phase i is row
// (block.row + r) stride + i - padding of the image, and columns are likewise. What tap (u, v) sees from a pixel of y is
// in phase u % phases, u / phases rows on: as far away for every pixel.
// With a phase for each column of the kernel the copy is as wide as y. Rows then lie on end without a gap, and narrow
// images can be cut into tiles that go on from a row to the next.
struct Copy {
  int64_t row_phases, column_phases, rows, columns;
  int64_t size;           // of a block of channels
  int64_t tap[kMaxTaps];  // how far it sees

  Copy(const ConvParams& p, const ConvBlocks& blocks, const Block& block) {
  
    const int64_t side = p.matrices == 1 ? 1 : 3;
    row_phases = min(p.stride, side);
    column_phases = blocks.flat ? side : row_phases;
    rows = block.rows + (side - 1) / row_phases;
    columns = block.columns + (side - 1) / column_phases;
    for (int64_t u = 0; u < side; ++u)
      for (int64_t v = 0; v < side; ++v) {
        const int64_t phase = u % row_phases * column_phases + v % column_phases;
        tap[u * side + v] = ((phase * rows + u / row_phases) * columns + v / column_phases) * kDepth;
      }
    size = (block.samples * sample() / kDepth | 1) * kDepth;  // odd, or all blocks would meet in the same cache sets
  }
  int64_t sample() const { return row_phases * column_phases * rows * columns * kDepth; }
};

DIFFKERN_FN void convert(const BFloat16* from, int64_t count, BFloat16* to) {
  std::memcpy(to, from, count * sizeof *to);
}

DIFFKERN_FN void convert(const float* from, int64_t count, BFloat16* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load(from + c));
  if (c < count) store(to + c, load(from + c, int(count - c)), int(count - c));
}

template <class T>
void copy_pixel(const ConvParams& p, int64_t pixel, int64_t first, int64_t last, BFloat16* to, int64_t block) {
  int64_t before = 0;  // channels of the sources before this one
  for (int source = 0; source < 2; before += p.channels[source++]) {
    const T* x = static_cast<const T*>(p.x[source]) + pixel * p.channels[source];
    const int64_t end = min(last, before + p.channels[source]);
    for (int64_t c = max(first, before), count; c < end; c += count) {
      count = min(kDepth - c % kDepth, end - c);
      BFloat16* const piece = to + (c - first) / kDepth * block + c % kDepth;
      if (count == kDepth)
        convert(x + c - before, kDepth, piece);  // of a size that the compiler knows
      else
        convert(x + c - before, count, piece);
    }
  }
}

// Channels [first, last) of what the block sees.
template <class T>
void fill(const ConvParams& p, const Block& block, const Copy& copy, int64_t first, int64_t last, BFloat16* to) {
  const int64_t height = p.height << p.upsample, width = p.width << p.upsample;
  const int64_t back = (last - first - 1) / kDepth * copy.size;  // the last block
  if (last % kDepth) std::memset(to + back, 0, copy.size * sizeof *to);  // behind the last channel too
  for (int64_t sample = block.sample; sample < block.sample + block.samples; ++sample)
    for (int64_t phase = 0; phase < copy.row_phases * copy.column_phases; ++phase)
      for (int64_t r = 0; r < copy.rows; ++r)
        for (int64_t c = 0; c < copy.columns; ++c, to += kDepth) {
          const int64_t h = (block.row + r) * p.stride + phase / copy.column_phases - p.padding;
          const int64_t w = (block.column + c) * p.stride + phase % copy.column_phases - p.padding;
          const int64_t pixel = (sample * p.height + (h >> p.upsample)) * p.width + (w >> p.upsample);
          if (0 <= h && h < height && 0 <= w && w < width)
            copy_pixel<T>(p, pixel, first, last, to, copy.size);
          else
            for (int64_t b = 0; b <= back; b += copy.size) std::memset(to + b, 0, kDepth * sizeof *to);
        }
}

// --- products --------------------------------------------------------------------------------------------------------

// C = A B, or C + A B, for one tile of pixels or two.
struct Product {
  const BFloat16* a[2];  // [blocks of channels, pixels of the copy, kDepth]
  const int64_t* tap;    // how far each sees, in elements
  int64_t taps, blocks, block;
  const BFloat16* b;  // [blocks, taps, kDepth / 2, kColumns, 2]
  float* c;           // [tiles, kPixels, kColumns]
  bool add;
};

#if defined(__AMX_BF16__)

struct Configuration {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr Configuration kAllTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// While there is one, the tiles are this thread's.
struct Unit {
  Unit() { _tile_loadconfig(&kAllTiles); }
  ~Unit() { _tile_release(); }
};

template <int tiles>
void multiply(const Product& p) {
  constexpr int64_t row = kColumns * sizeof(float), half = kColumns / 2;
  __asm__ volatile("" ::: "memory");  // GCC does not know that tile loads read what was stored before
  if (p.add) {
    _tile_loadd(0, p.c, row);
    _tile_loadd(1, p.c + half, row);
    if (tiles == 2) _tile_loadd(2, p.c + kPixels * kColumns, row);
    if (tiles == 2) _tile_loadd(3, p.c + kPixels * kColumns + half, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const BFloat16* b = p.b;
  for (int64_t block = 0; block < p.blocks; ++block)
    for (int64_t t = 0; t < p.taps; ++t, b += kDepth * kColumns) {
      const int64_t offset = block * p.block + p.tap[t];
      _tile_loadd(4, p.a[0] + offset, kDepth * 2);
      _tile_loadd(6, b, row);
      _tile_loadd(7, b + kColumns, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (tiles == 2) {
        _tile_loadd(5, p.a[1] + offset, kDepth * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  _tile_stored(0, p.c, row);
  _tile_stored(1, p.c + half, row);
  if (tiles == 2) _tile_stored(2, p.c + kPixels * kColumns, row);
  if (tiles == 2) _tile_stored(3, p.c + kPixels * kColumns + half, row);
}

#else

struct Unit {
  ~Unit() {}
};

// sum + a[0] b[0] + a[1] b[1], in each lane
DIFFKERN_FN f32v add_pair(f32v sum, i32v a, i32v b) {
#if defined(__AVX512BF16__)
  return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  constexpr int32_t high = int32_t(0xFFFF0000);
  sum = multiply_add(as_float(a << 16), as_float(b << 16), sum);
  return multiply_add(as_float(a & high), as_float(b & high), sum);
#endif
}

DIFFKERN_FN i32v load_pairs(const BFloat16* p) {
  i32v pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return pairs;
}

DIFFKERN_FN i32v broadcast_pair(const BFloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return i32v{} + pair;
}

constexpr int kRows = kLanes == 16 ? 8 : 4;  // of a tile of registers, which has two columns of them

void multiply_registers(const Product& p, const BFloat16* a, const BFloat16* b, float* c) {
  f32v sum[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[r][v] = p.add ? load(c + r * kColumns + v * kLanes) : f32v{};
  for (int64_t block = 0; block < p.blocks; ++block)
    for (int64_t t = 0; t < p.taps; ++t) {
      const BFloat16* pixels = a + block * p.block + p.tap[t];
      for (int64_t k = 0; k < kDepth; k += 2, b += 2 * kColumns) {
        const i32v b_k[2] = {load_pairs(b), load_pairs(b + 2 * kLanes)};
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const i32v a_rk = broadcast_pair(pixels + r * kDepth + k);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) sum[r][v] = add_pair(sum[r][v], a_rk, b_k[v]);
        }
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(c + r * kColumns + v * kLanes, sum[r][v]);
}

template <int tiles>
void multiply(const Product& p) {
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t r = 0; r < kPixels; r += kRows)
      for (int64_t column = 0; column < kColumns; column += 2 * kLanes)
        multiply_registers(p, p.a[tile] + r * kDepth, p.b + 2 * column,
                           p.c + (tile * kPixels + r) * kColumns + column);
}

#endif

void multiply(int tiles, const Product& p) { tiles == 2 ? multiply<2>(p) : multiply<1>(p); }

// --- a work item -----------------------------------------------------------------------------------------------------

// Neighbours in y and in the copy.
struct Tile {
  int64_t sample, first, count;  // first: of y's pixels, all samples' in a row
  int64_t from;                  // where the first is in the copy
};

int find_tiles(const ConvParams& p, const ConvBlocks& blocks, const Block& block, const Copy& copy, Tile* tiles) {
  const int64_t lines = blocks.flat ? 1 : block.rows, line = blocks.flat ? block.rows * block.columns : block.columns;
  int count = 0;
  for (int64_t s = 0; s < block.samples; ++s)
    for (int64_t r = 0; r < lines; ++r)
      for (int64_t i = 0; i < line; i += kPixels) {
        const int64_t sample = block.sample + s;
        const int64_t first = ((sample * p.out_height) + block.row + r) * p.out_width + block.column + i;
        tiles[count++] = {sample, first, min(kPixels, line - i), s * copy.sample() + (r * copy.columns + i) * kDepth};
      }
  return count;
}

// y = c + bias + add + residual
template <class T>
void finish(const ConvParams& p, const Tile& tile, int64_t panel, const float* c) {
  for (int64_t column = 0; column < kColumns; column += kLanes) {
    const int64_t k = panel * kColumns + column;
    const int count = int(min(kLanes, p.out_channels - k));
    if (count <= 0) return;
    f32v constant{};
    if (p.bias) constant = load(p.bias + k, count);
    if (p.add) constant = constant + load(p.add + tile.sample * p.add_stride + k, count);
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t at = (tile.first + i) * p.out_channels + k;
      f32v y = load(c + i * kColumns + column) + constant;
      const T* residual = static_cast<const T*>(p.residual);
      if (count == kLanes) {
        if (residual) y = y + load(residual + at);
        store(static_cast<T*>(p.y) + at, y);
      } else {
        if (residual) y = y + load(residual + at, count);
        store(static_cast<T*>(p.y) + at, y, count);
      }
    }
  }
}

void finish(const ConvParams& p, const Tile& tile, int64_t panel, const float* c) {
  if (p.y_dtype == DType::bf16)
    finish<BFloat16>(p, tile, panel, c);
  else
    finish<float>(p, tile, panel, c);
}

void fill(const ConvParams& p, const Block& block, const Copy& copy, int64_t first, int64_t last, BFloat16* to) {
  if (p.x_dtype == DType::bf16)
    fill<BFloat16>(p, block, copy, first, last, to);
  else
    fill<float>(p, block, copy, first, last, to);
}

// As many channels at a time as the copy holds, and of these so many that the weights of a panel stay in the L1 cache
// while the block's tiles go by.
void convolve(const ConvParams& p, const ConvBlocks& blocks, const Block& block) {
  alignas(64) BFloat16 copied[(kCopied + kPixels) * kDepth];
  alignas(64) float sums[kMaxPanels][kBlockTiles][kPixels * kColumns];
  Tile tiles[kBlockTiles];
  const Copy copy(p, blocks, block);
  const int count = find_tiles(p, blocks, block, copy, tiles);
  const int64_t taps = p.matrices, depth = p.depth(), step = max(1, kSteps / taps) * kDepth;
  const int64_t fit = kCopied * kDepth / copy.size * kDepth;
  for (int64_t filled = 0; filled < depth; filled += fit) {
    const int64_t end = min(depth, filled + fit);
    fill(p, block, copy, filled, end, copied);
    for (int64_t panel = 0; panel < block.panels; ++panel) {
      const BFloat16* weight = static_cast<const BFloat16*>(p.weight) +
                               (block.panel + panel) * p.depth_blocks() * taps * kDepth * kColumns;
      for (int64_t first = filled; first < end; first += step) {
        const int64_t last = min(end, first + step);
        for (int t = 0; t < count; t += 2) {
          const int pair = min(2, count - t);
          const BFloat16* a = copied + (first - filled) / kDepth * copy.size;
          multiply(pair, {.a = {a + tiles[t].from, a + tiles[t + pair - 1].from}, .tap = copy.tap, .taps = taps,
                          .blocks = (last - first + kDepth - 1) / kDepth, .block = copy.size,
                          .b = weight + first * taps * kColumns, .c = sums[panel][t], .add = first > 0});
          for (int i = t; i < t + pair && last == depth; ++i) finish(p, tiles[i], block.panel + panel, sums[panel][i]);
        }
      }
    }
  }
}

}  // namespace

void conv_bf16(const ConvParams& p, int64_t begin, int64_t end) {
  const Unit unit;
  const ConvBlocks blocks(p);
  for (int64_t item = begin; item < end; ++item) convolve(p, blocks, block_of(p, blocks, item));
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
