// y = conv(x) + bias + add + residual: products of bfloat16, or of sums of bfloat16 terms, added up in float32
// (gemm_bf16.h).
//
// A work item is a block of pixels, in tiles of 16, and some panels of 32 columns. Where 16 pixels as a tap sees them
// lie evenly in x, products read them there; elsewhere they are copied (bf16_input.h). The weight is packed in the
// order in which it is used.
//
// Nearest-neighbour upsampling and a 3x3 kernel are four kernels of 2x2 taps, one for each parity of a pixel's row and
// column: all see the same 3x3 pixels of x, and their columns come one after the other, as quarters.

#include "bf16_input.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kCopied = 1984;  // of a term of the copy, pixels by kDepth channels at most

// Panel by panel, so that the weights of some stay in the L2 cache while all pixels go by.
Block block_of(const ConvParams& p, const ConvBlocks& blocks, int64_t item) {
  const int64_t place = item % blocks.places(), panel = item / blocks.places() * blocks.panels;
  const int64_t column = place % blocks.across * blocks.columns;
  const int64_t row = place / blocks.across % blocks.down * blocks.rows;
  const int64_t sample = place / (blocks.across * blocks.down) * blocks.samples;
  return {sample, min(blocks.samples, p.samples - sample), row, min(blocks.rows, p.grid_height() - row),
          column, min(blocks.columns, p.grid_width() - column), panel, min(blocks.panels, p.panels() - panel)};
}

// 16 pixels of y, all of whose samples are in a row; of an upsampled one, those that are even both ways.
struct Tile {
  int64_t sample, count, pixel[kRows];
  const BFloat16* rows[2];  // what the first one sees, in each part
};

// The rows of the input that a block's tiles read.
struct Seen {
  RowsOfA parts[2];
  int64_t part_count;
};

// Tiles of the block, and from(sample, row, column) of the block for each of them.
template <class From>
int find_tiles(const ConvParams& p, const ConvBlocks& blocks, const Block& block, Tile* tiles, From from) {
  const int64_t lines = blocks.flat ? 1 : block.rows, line = blocks.flat ? block.rows * block.columns : block.columns;
  const int64_t apart = p.quarters() == 4 ? 2 : 1;
  int count = 0;
  for (int64_t n = 0; n < block.samples; ++n)
    for (int64_t r = 0; r < lines; ++r)
      for (int64_t c = 0; c < line; c += kRows) {
        Tile& tile = tiles[count++];
        tile.sample = block.sample + n, tile.count = min(kRows, line - c);
        for (int64_t i = 0; i < tile.count; ++i) {
          const int64_t row = block.row + r + (c + i) / block.columns, column = block.column + (c + i) % block.columns;
          tile.pixel[i] = (tile.sample * p.out_height + apart * row) * p.out_width + apart * column;
        }
        from(tile, n, r, c);
      }
  return count;
}

// y = c + bias + add + residual, of a tile and a panel; whole if this has all its columns.
template <class T, bool whole>
void finish(const ConvParams& p, const Tile& tile, int64_t panel, const float* c) {
  constexpr int registers = kColumns / kLanes;
  const int64_t quarter = panel / p.column_panels(), k = panel % p.column_panels() * kColumns;
  const int64_t channels = p.out_channels, first = (quarter / 2 * p.out_width + quarter % 2) * channels + k;
  const auto lanes = [&](int v) { return int(max(0, min(kLanes, channels - k - v * kLanes))); };
  f32v constant[registers] = {};
  for (int v = 0; v < registers; ++v) {
    if (p.bias) constant[v] = load(p.bias + k + v * kLanes, lanes(v));
    if (p.add) constant[v] = constant[v] + load(p.add + tile.sample * p.add_stride + k + v * kLanes, lanes(v));
  }
  const T* const residual = static_cast<const T*>(p.residual);
  T* const y = static_cast<T*>(p.y);
  for (int64_t i = 0; i < tile.count; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < registers; ++v) {
      const int64_t at = tile.pixel[i] * channels + first + v * kLanes;
      f32v sum = load(c + i * kColumns + v * kLanes) + constant[v];
      if (residual) sum = sum + (whole ? load(residual + at) : load(residual + at, lanes(v)));
      whole ? store(y + at, sum) : store(y + at, sum, lanes(v));
    }
}

// Asks for what finish reads and writes. A function that only prefetches does nothing in the eyes of the optimiser,
// unless it is inlined.
DIFFKERN_FN void ask(const ConvParams& p, const Tile& tile, int64_t panel) {
  const int64_t quarter = panel / p.column_panels(), k = panel % p.column_panels() * kColumns;
  const int64_t size = p.y_dtype == DType::bf16 ? 2 : 4;
  const int64_t first = (quarter / 2 * p.out_width + quarter % 2) * p.out_channels + k;
  for (int64_t i = 0; i < tile.count; ++i)
    for (int64_t line = 0; line < kColumns * size; line += 64) {
      const int64_t at = (tile.pixel[i] * p.out_channels + first) * size + line;
      __builtin_prefetch(static_cast<char*>(p.y) + at, 1);
      if (p.residual) __builtin_prefetch(static_cast<const char*>(p.residual) + at);
    }
}

void finish(const ConvParams& p, const Tile& tile, int64_t panel, const float* c) {
  const bool whole = (panel % p.column_panels() + 1) * kColumns <= p.out_channels;
  if (p.y_dtype == DType::bf16)
    whole ? finish<BFloat16, true>(p, tile, panel, c) : finish<BFloat16, false>(p, tile, panel, c);
  else
    whole ? finish<float, true>(p, tile, panel, c) : finish<float, false>(p, tile, panel, c);
}

// Tiles with panels [first_panel, last_panel), pair by pair: what a pair sees stays in the L1 cache. The products are
// those of some blocks of channels, from number `first` on; after the last ones y is written.
template <int terms>
void multiply_tiles(const ConvParams& p, const Seen& seen, const Tile* tiles, int count, int64_t first_panel,
                    int64_t last_panel, int64_t first, float* sums) {
  int64_t blocks = 0;
  for (int64_t part = 0; part < seen.part_count; ++part) blocks += seen.parts[part].blocks;
  const bool all = blocks == p.depth_blocks(), last = first + blocks == p.depth_blocks();
  for (int t = 0; t < count; t += 2) {
    const int pair = int(min(2, count - t));
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      RowsOfA parts[2] = {seen.parts[0], seen.parts[1]};
      for (int64_t part = 0; part < seen.part_count; ++part) {
        parts[part].tap += panel / p.column_panels() * p.matrices;
        for (int i = 0; i < pair; ++i) parts[part].tile[i] = tiles[t + i].rows[part];
      }
      float* const c = sums + (all ? 0 : (panel - first_panel) * kBlockTiles + t) * kRows * kColumns;
      const Product product{.parts = parts, .part_count = seen.part_count, .taps = p.matrices,
                            .b = static_cast<const BFloat16*>(p.weight) +
                                 (panel * p.depth_blocks() + first) * p.matrices * terms * kDepth * kColumns,
                            .c = c, .add = first > 0};
      for (int i = 0; i < pair && last; ++i) ask(p, tiles[t + i], panel);
      pair == 2 ? multiply<2, terms>(product) : multiply<1, terms>(product);
      for (int i = 0; i < pair && last; ++i) finish(p, tiles[t + i], panel, c + i * kRows * kColumns);
    }
  }
}

// Fast path: x already has the layout that the micro-kernel needs.
template <int terms>
void convolve_in_place(const ConvParams& p, const ConvBlocks& blocks, const Block& block) {
  alignas(64) float sums[2][kRows * kColumns];
  Tile tiles[kBlockTiles];
  int64_t tap[2][kMaxTaps];
  Seen seen{};
  seen.part_count = p.channels[1] > 0 ? 2 : 1;
  int count = 0;
  for (int64_t part = 0; part < seen.part_count; ++part) {
    const Source source(p, int(part));
    find_taps(p, tap[part], [&](int64_t u, int64_t v) { return u * source.row + v * source.pixel; });
    seen.parts[part] = {.tile = {}, .row = p.stride * source.pixel, .block = source.block, .term = source.term,
                        .blocks = (p.channels[part] + kDepth - 1) / kDepth, .tap = tap[part]};
    count = find_tiles(p, blocks, block, tiles, [&](Tile& tile, int64_t n, int64_t r, int64_t c) {
      tile.rows[part] = static_cast<const BFloat16*>(p.x[part]) +
                        source.at(block.sample + n, (block.row + r) * p.stride - p.padding,
                                  (block.column + c) * p.stride - p.padding);
    });
  }
  multiply_tiles<terms>(p, seen, tiles, count, block.panel, block.panel + block.panels, 0, sums[0]);
}

// 256 to 512 KB.
template <int terms>
struct alignas(64) CopyArrays {
  BFloat16 copied[(kCopied * terms + kRows) * kDepth];
  float sums[kMaxPanels][kBlockTiles][kRows * kColumns];
};

// As many channels at a time as the copy holds; if that is not all, with so many panels as there is room for sums.
template <int terms>
void convolve_copy(const ConvParams& p, const ConvBlocks& blocks, const Block& block) {
  CopyArrays<terms>& arrays = scratch<CopyArrays<terms>>();
  Tile tiles[kBlockTiles];
  const Copy copy(p, blocks, block);
  const int count = find_tiles(p, blocks, block, tiles, [&](Tile& tile, int64_t n, int64_t r, int64_t c) {
    tile.rows[0] = arrays.copied + n * copy.sample() + (r * copy.columns + c) * kDepth;
  });
  const int64_t depth = p.depth(), fit = kCopied * kDepth / copy.size * kDepth;
  const int64_t last_panel = block.panel + block.panels, panels = fit < depth ? kMaxPanels : block.panels;
  for (int64_t panel = block.panel; panel < last_panel; panel += panels)
    for (int64_t first = 0; first < depth; first += fit) {
      const int64_t last = min(depth, first + fit);
      fill<terms>(p, block, copy, first, last, arrays.copied);
      const Seen seen{.parts = {{.tile = {}, .row = kDepth, .block = terms * copy.size, .term = copy.size,
                                 .blocks = (last - first + kDepth - 1) / kDepth, .tap = copy.tap}},
                      .part_count = 1};
      multiply_tiles<terms>(p, seen, tiles, count, panel, min(last_panel, panel + panels), first / kDepth,
                            arrays.sums[0][0]);
    }
}

template <int terms>
void convolve(const ConvParams& p, int64_t begin, int64_t end) {
  const Unit unit;
  const ConvBlocks blocks(p);
  for (int64_t item = begin; item < end; ++item) {
    const Block block = block_of(p, blocks, item);
    if (blocks.in_place)
      convolve_in_place<terms>(p, blocks, block);
    else
      convolve_copy<terms>(p, blocks, block);
  }
}

}  // namespace

void conv_bf16(const ConvParams& p, int64_t begin, int64_t end) {
  switch (p.terms) {
    case 1: return convolve<1>(p, begin, end);
    case 2: return convolve<2>(p, begin, end);
    case 3: return convolve<3>(p, begin, end);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
