// What each kernel is given: one struct an op, the same for CPU and CUDA. Kernels know no torch.

#pragma once

#include <cstdint>

namespace diffkern {

static constexpr int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }  // for a >= 0: no overflow

enum class DType : int32_t { f32, bf16, f16 };

constexpr int kMaxDims = 5;
constexpr int kMaxHistory = 4;

// A batch of samples: element i of sample n, in the logical (C, H, W) order, whatever the memory format.
// Dimensions that lie together are merged, so a contiguous sample has one dimension of stride 1.
struct View {
  void* data;  // null: not there
  DType dtype;
  int32_t dims;
  int64_t batch_stride;
  int64_t sizes[kMaxDims], strides[kMaxDims];  // of one sample, outermost first

  bool contiguous() const { return dims == 1 && strides[0] == 1; }
};

// z = the noise of (seed, step, stream)
struct NoiseParams {
  View z;
  int64_t samples, elements;  // N, C H W
  const int64_t* seeds;       // [N]
  const int64_t* step;        // [N], or [1] with a stride of 0
  int64_t step_stride;
  uint32_t stream;
};

// x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
struct QSampleParams {
  View x_0, x_t, eps;  // eps may be null
  int64_t samples, elements;
  const int64_t* seeds;  // [N]
  const int64_t* t;      // [N], or [1] with a stride of 0
  int64_t t_stride;
  const float* table;  // [T, 2]: sqrt(alpha_bar), sqrt(1 - alpha_bar)
  int64_t rows;        // T
};

// x_next = k_x x + k_o o + k_0 x0_hat + sum_j k_j h_j + sigma z, x0_hat = p_x x + p_o o   (math/update.h)
struct ReverseStepParams {
  View x, out, x_next;
  View out_uncond, x0_hat;    // may be null
  View history[kMaxHistory];  // h_j
  int64_t history_count;
  int64_t samples, elements;
  const int64_t* seeds;  // [N]
  const float* table;    // [rows, columns]
  int64_t rows, columns;
  const int64_t* step;  // the row: [N], or [1] with a stride of 0
  int64_t step_stride;
  float guidance;
  bool clip, learned_variance;
};

// loss_n = weight_n mean (out - eps)^2
struct NoiseLossParams {
  View out;
  View grad_out;  // backward only
  int64_t samples, elements;
  const int64_t* seeds;    // [N]
  const int64_t* t;        // [N], or [1] with a stride of 0
  int64_t t_stride;
  const float* weights;    // [N] or null
  double* partial;         // [N, chunks], forward only
  float* loss;             // [N], forward only
  const float* grad_loss;  // [N], backward only
};

// [N, heads, tokens, d], the channels of a token together.
struct HeadsView {
  void* data;
  int64_t sample_stride, head_stride, token_stride;
};

// out = softmax(q k^T scale) v
struct AttentionParams {
  HeadsView q, k, v, out;
  DType dtype;  // of them and their gradients: float32 on the CPU, but for attention_terms
  int64_t samples, heads, queries, keys, channels;
  float scale;
  float* lse;                                  // [N, heads, queries]: ln sum_key exp(scale q . k)
  HeadsView grad_out, grad_q, grad_k, grad_v;  // backward only
  float* grad_q_parts;                         // [spans - 1, N, queries, heads, d]: the first span's part is in grad_q
  float* delta;                                // [N, heads, queries]: grad_out . out. CUDA only, which has no parts

  // CPU only. A forward work item is a block of queries of one head, a backward one a span of its keys.
  int terms;            // of bfloat16, whose sum is a number; 0 in attention
  int64_t query_block;  // up to kAttentionBlock in attention, kTermsQueries in attention_terms
  int64_t key_span;     // whole blocks
  int64_t query_blocks() const { return divide_up(queries, query_block); }
  int64_t key_spans() const { return divide_up(keys, key_span); }
};

// Of attention_terms, at most: channels of a head, queries of a work item.
constexpr int64_t kMaxTermsHead = 256, kTermsQueries = 256;

constexpr int64_t kAttentionBlock = 64;  // of tokens

// y = silu(norm(x + add) (1 + scale) + shift) + residual. All tensors of the shape of x have its dtype and layout, but
// a blocked y, which CPUs write for conv_bf16 (ConvParams).
struct GroupNormSiluParams {
  const void* x;         // [N, C, H, W], contiguous or channels_last
  const void* skip;       // null, or [N, skip_channels, H, W]: the last of the C channels, which x then lacks; forward
  int64_t skip_channels;  // on the CPU, in channels_last memory
  const void* residual;  // [N, C, H, W] or null
  void* y;               // [N, C, H, W]
  DType dtype;
  bool channels_last, silu;
  int64_t blocked_width;                      // W if y is blocked, or 0
  int terms;                                  // of bfloat16 in a blocked y, or 0
  int64_t samples, channels, groups, pixels;  // N, C, G, H W
  float eps;
  const float* weight;       // [C]
  const float* bias;         // [C]
  const float* scale_shift;  // [N, 2, C] or null
  const float* add;          // [N, C] or null
  float* mean;               // [N, G], of x + add; null on the CPU if it need not be known
  float* rstd;               // [N, G]
  // Backward only. z, the argument of silu, is xhat a channel's slope plus its offset, xhat = (x + add - mean) rstd.
  const void* grad_y;  // [N, C, H, W]
  void* grad_x;        // [N, C, H, W]
  float* grad_offset;  // [N, C]: sum over the pixels of grad_z
  float* grad_slope;   // [N, C]: sum over the pixels of grad_z xhat
  // CUDA only, for images that are more than one block's work (cuda/plan.h).
  double* partial_moments;  // [N, G, chunks, 2]: a chunk's mean and its sum of squared distances from that
  float* partial_sums;      // [N, chunks, 2, C]: a chunk's grad_offset, and its grad_slope / rstd

  // The CPU's work items: blocks of whole groups that fill whole registers, of 64 channels or a few more.
  int64_t groups_per_block() const {
    const int64_t width = channels / groups;
    int64_t step = 1;
    while (step * width % 16 != 0) step *= 2;
    return divide_up(64, step * width) * step;
  }
  int64_t blocks() const { return divide_up(groups, groups_per_block()); }  // a sample
};
constexpr int64_t kMaxGroupsPerBlock = 64;

constexpr int64_t kDirectColumns = 64, kDirectPixels = 96;  // conv_direct's blocks: of the weight's columns, of pixels
constexpr int64_t kWinogradColumns = 64, kWinogradTiles = 30;  // conv_winograd's: of the weight's columns, of tiles
constexpr int64_t kTapColumns = 32, kTapTiles = 32, kTapDepth = 16;  // conv_winograd_taps's, and channels at a time
constexpr int64_t kFewColumns = 4;                             // so many or fewer are packed one a block
constexpr int64_t kTilePixels = 16, kBlockTiles = 8;           // conv_bf16's: pixels of a tile, tiles of a block,
constexpr int64_t kPanel = 32, kMaxPanels = 8;                 // columns of a panel, panels that a copy serves at most,
constexpr int64_t kDepthBlock = 32;                            // and channels that lie together in its weight
constexpr int kMaxTerms = 3;                                   // of bfloat16, whose sum is a number

// y = conv(x) + bias + add + residual. Everything is channels_last: the channels of a pixel together.
// What lies outside the image is 0. The weight says by its number of matrices how it is to be used: 36 are Winograd's
// F(4x4, 3x3), 9 and 1 are the taps of a 3x3 and of a 1x1 kernel, and 4 an upsampling kernel's (quarters, below).
// x, residual and y are float32, or with a weight of one term of bfloat16 either dtype; bias and add are float32.
// A blocked image is [N, C / 32, terms, H + 2, W + 2, 32] of bfloat16, with zeros around it.
struct ConvParams {
  const void* x[2];  // [N, H, W, channels[0]], [N, H, W, channels[1]]: one after the other; the second may be null
  int64_t channels[2];
  const void* weight;    // [matrices, column blocks, channels, column block], or conv_bf16's
  const float* bias;     // [K] or null
  const float* add;      // [N, K] or null, a sample apart by add_stride
  const void* residual;  // [N, H', W', K] or null
  void* y;               // [N, H', W', K]
  DType x_dtype, y_dtype;
  int64_t samples, height, width, out_height, out_width, out_channels;
  int64_t matrices, stride, padding, add_stride;  // padding: rows above and columns to the left
  bool upsample;  // each pixel of x is four, 2x2, of the image that is convolved
  bool taps;      // the weight is [column blocks, channels, 9, column block], of which Winograd's 36 matrices are made
  bool blocked;   // x is, and there is no second source
  int terms;      // of bfloat16, of an element of the weight and of x; 0 where products are of float32

  int64_t depth() const { return channels[0] + channels[1]; }
  int64_t pixels() const { return samples * out_height * out_width; }

  // conv_direct's work items: a block of pixels, of all samples in a row, and a block of columns. Small maps are cut
  // finer, to be enough for several threads.
  bool few_columns() const { return out_channels <= kFewColumns; }
  int64_t direct_columns() const { return divide_up(out_channels, kDirectColumns); }
  int64_t direct_pixels() const {
    const int64_t share = divide_up(pixels() * direct_columns(), 8), fine = share < 24 ? 24 : share;
    const int64_t most = fine < kDirectPixels ? fine : kDirectPixels, blocks = divide_up(pixels(), most);
    return divide_up(divide_up(pixels(), blocks), 6) * 6;  // as even as they come, in whole tiles of 6 pixels
  }
  int64_t direct_items() const { return divide_up(pixels(), direct_pixels()) * direct_columns(); }

  // conv_winograd's and conv_winograd_taps's work items: a block of tiles, of all samples in a row and as even as they
  // come, and a block of columns. Where that makes less than four, the tiles are cut finer, as long as a block has eight.
  bool winograd() const { return matrices == 36; }
  int64_t tiles_high() const { return divide_up(out_height, 4); }  // a tile has 4 x 4 outputs
  int64_t tiles_wide() const { return divide_up(out_width, 4); }
  int64_t tiles() const { return samples * tiles_high() * tiles_wide(); }
  int64_t winograd_column() const { return taps ? kTapColumns : kWinogradColumns; }  // a block
  int64_t winograd_columns() const { return divide_up(out_channels, winograd_column()); }
  int64_t winograd_blocks() const {
    const int64_t enough = divide_up(4, winograd_columns()), most = tiles() / 8;
    const int64_t fine = enough < most ? enough : most, size = taps ? kTapTiles : kWinogradTiles;
    const int64_t coarse = divide_up(tiles(), size);
    return fine > coarse ? fine : coarse;
  }
  int64_t winograd_tiles() const { return divide_up(tiles(), winograd_blocks()); }
  int64_t winograd_items() const { return winograd_blocks() * winograd_columns(); }

  // conv_bf16's view of it. Four matrices are an upsampling 3x3 kernel, in quarters of 2x2 taps: for each parity of a
  // pixel's row and column.
  int64_t quarters() const { return matrices == 4 ? 4 : 1; }
  int64_t side() const { return matrices == 1 ? 1 : 3; }
  int64_t grid_height() const { return matrices == 4 ? height : out_height; }
  int64_t grid_width() const { return matrices == 4 ? width : out_width; }
  int64_t column_panels() const { return divide_up(out_channels, kPanel); }
  int64_t panels() const { return quarters() * column_panels(); }
  int64_t depth_blocks() const { return divide_up(depth(), kDepthBlock); }
};

// A weight as conv_winograd takes it, made of one for conv_winograd_taps.
struct ExpandTapsParams {
  const float* taps;  // [tap_blocks, C, 9, kTapColumns]
  float* matrices;    // [36, column_blocks, C, kWinogradColumns]; what is beyond the taps' columns is left alone
  int64_t channels, tap_blocks, column_blocks;

  int64_t depths() const { return divide_up(channels, kTapDepth); }
  int64_t items() const { return tap_blocks * depths(); }
};

// conv_bf16's work items: a block of pixels, of one image or of several small ones, and some panels of columns, whose
// weights stay in the L2 cache. Small maps leave few blocks, which are then given fewer panels, for several threads.
struct ConvBlocks {
  bool flat;                       // rows are no whole tiles: a tile goes on in the next one
  bool in_place;                   // every tile that a tap sees lies in x, its rows evenly apart
  int64_t columns, rows, samples;  // of a block
  int64_t across, down, along;     // blocks in a row of an image, in a column of it, in the batch
  int64_t panels, groups;          // of an item; so many groups of them

  explicit ConvBlocks(const ConvParams& p) {
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    constexpr int64_t most = kBlockTiles * kTilePixels, cached = 1280 * 1024;
    const int64_t height = p.grid_height(), width = p.grid_width(), border = p.blocked ? 1 : 0;
    const auto inside = [&](int64_t size, int64_t out_size) {
      return p.padding <= border && (out_size - 1) * p.stride + p.side() - p.padding <= size + border;
    };
    const bool whole_blocks = p.blocked || (p.channels[0] % kDepthBlock == 0 && p.channels[1] % kDepthBlock == 0);
    in_place = p.x_dtype == DType::bf16 && (!p.upsample || p.quarters() == 4) && whole_blocks &&
               width % kTilePixels == 0 && inside(p.height, height) && inside(p.width, width);
    flat = width % kTilePixels != 0 && width < most / 2;
    columns = least(width, height == 1 ? most : most / 2);
    rows = least(height, most / columns);
    const bool whole = columns == width && rows == height;
    const int64_t tiles = flat ? divide_up(rows * columns, kTilePixels) : rows * divide_up(columns, kTilePixels);
    samples = whole ? least(p.samples, kBlockTiles / tiles) : 1;
    across = divide_up(width, columns);
    down = divide_up(height, rows);
    along = divide_up(p.samples, samples);
    const int64_t fit = divide_up(cached, p.matrices * p.depth_blocks() * kDepthBlock * kPanel * p.terms * 2);
    panels = divide_up(p.panels(), divide_up(p.panels(), fit));
    while (panels > 1 && places() * divide_up(p.panels(), panels) < 4) panels = divide_up(panels, 2);
    groups = divide_up(p.panels(), panels);
  }
  int64_t places() const { return across * down * along; }
  int64_t items() const { return places() * groups; }
};

// A 3x3 convolution's weight as conv_winograd_taps takes it; or turned, that of the input gradient: each channel's kernel
// by 180 degrees, and channels for output channels.
struct PackTapsParams {
  const float* weight;  // [K, 3, 3, C], or turned [C, 3, 3, K]
  float* taps;          // [column_blocks, C, 9, kTapColumns], zeros behind K
  int64_t channels, out_channels;  // C, K
  bool turned;

  int64_t column_blocks() const { return divide_up(out_channels, kTapColumns); }
  int64_t elements() const { return column_blocks() * channels * 9 * kTapColumns; }

  // Work items: a block of columns and some channels.
  static constexpr int64_t kDepth = 16;
  int64_t depths() const { return divide_up(channels, kDepth); }
  int64_t items() const { return column_blocks() * depths(); }
};

// The weight gradient of a 3x3 convolution of stride 1 and padding 1, float32 in channels_last memory.
struct Conv3x3GradientParams {
  const float* x;       // [N, H, W, C]
  const float* grad_y;  // [N, H, W, K]
  float* parts;         // [parts, K, 3, 3, C], each over its own tiles. One part alone is the gradient
  float* grad_weight;   // [K, 3, 3, C]
  int64_t samples, height, width, channels, out_channels;  // N, H, W, C, K
  int64_t part_count;                                      // enough_parts()

  int64_t tiles_high() const { return divide_up(height, 4); }
  int64_t tiles_wide() const { return divide_up(width, 4); }
  int64_t tiles() const { return samples * tiles_high() * tiles_wide(); }

  // Work items: a block of output channels, one of channels, and a part of the tiles.
  static constexpr int64_t kTiles = 32, kChannels = 64;  // of a block
  int64_t channel_blocks() const { return divide_up(channels, kChannels); }
  int64_t blocks() const { return divide_up(out_channels, kChannels) * channel_blocks(); }

  // As many parts as give several threads an item, and each item a few blocks of tiles.
  int64_t enough_parts() const {
    const int64_t wanted = divide_up(8, blocks()), most = tiles() / (2 * kTiles);
    return most < 1 ? 1 : wanted < most ? wanted : most;
  }
};

// Order-free hashes of a function of one word over runs of codes: the proof that every machine has the same one.
struct WordHashParams {
  bool angle;      // cos and sin of the phase, or the radius
  uint64_t* hash;  // [items], each over kCodesPerHash codes
};
constexpr int64_t kCodesPerHash = int64_t(1) << 20;

// Work on elements is cut into chunks of one sample.
constexpr int64_t kChunk = 1024;
inline constexpr int64_t chunks(int64_t elements) { return divide_up(elements, kChunk); }

}  // namespace diffkern
