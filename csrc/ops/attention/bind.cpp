// Attention, into given memory too, and its gradient.

#include <algorithm>
#include <cmath>
#include <string_view>

#include "bindings/op.h"

namespace diffkern {
namespace {

Tensor as_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);  // which would cost a microsecond to do nothing
}

// The dtype that the kernels read and write: float32 on the CPU.
ScalarType heads_dtype(const Tensor& x) { return on_cuda(x) ? x.scalar_type() : ScalarType::Float; }

// A tensor as the kernels read it: of that dtype, with the channels of a token together.
Tensor as_heads(const char* name, const Tensor& x) {
  check_memory(name, x);
  const Tensor heads = as_dtype(x, heads_dtype(x));
  return heads.stride(3) == 1 ? heads : torch::stable::contiguous(heads);
}

HeadsView heads_view(const char* name, const Tensor& x) {
  return {memory<void>(name, x), x.stride(0), x.stride(1), x.stride(2)};
}

// Laid out as [N, tokens, heads, d], as the projections around attention have it.
Tensor empty_heads(const Tensor& like) {
  return torch::stable::transpose(
      empty_of({like.size(0), like.size(2), like.size(1), like.size(3)}, heads_dtype(like), like), 1, 2);
}

// q, k and v are as_heads already.
AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  AttentionParams params{};
  params.q = heads_view("q", q);
  params.k = heads_view("k", k);
  params.v = heads_view("v", v);
  params.dtype = dtype_of("q", q.scalar_type());
  params.samples = q.size(0);
  params.heads = q.size(1);
  params.queries = q.size(2);
  params.keys = k.size(2);
  params.channels = q.size(3);
  params.scale = float(scale.value_or(1 / std::sqrt(double(q.size(3)))));
  return params;
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  check(q.dim() == 4, "q: expected [N, heads, tokens, d], got shape ", show(sizes_of(q)));
  check(k.dim() == 4, "k: expected [N, heads, tokens, d], got shape ", show(sizes_of(k)));
  dtype_of("q", q.scalar_type());
  check_like("k", k, q, {q.size(0), q.size(1), k.size(2), q.size(3)});
  check_like("v", v, q, sizes_of(k));
  check(q.size(2) > 0 && q.size(3) > 0, "q: expected at least one token and one channel, got shape ",
        show(sizes_of(q)));
  check(k.size(2) > 0, "k: expected at least one token, got shape ", show(sizes_of(k)));
}

// Do products of bfloat16 terms take heads of so many channels?
bool take_terms(int64_t channels) { return channels % kDepthBlock == 0 && channels <= kMaxTermsHead; }

// The time of the busiest thread, if a work item is a block of a head's tokens and takes as long as these and so many.
int64_t time_of(const AttentionParams& p, int64_t tokens, int64_t block, int64_t more) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t items = p.samples * p.heads * ((tokens + block - 1) / block);
  return (items + threads - 1) / threads * (std::min(block, tokens) + more);
}

// Queries of a work item, `most` of them at most. They stand alone: the cut does not touch their bits.
int64_t query_block(const AttentionParams& p, int64_t most) {
  constexpr int64_t least = 32;  // which take as long as to pack the keys
  int64_t best = most;
  for (int64_t block = most / 2; block >= least; block /= 2)
    if (time_of(p, p.queries, block, least) < time_of(p, p.queries, best, least)) best = block;
  return best;
}

// Keys of a work item of the backward pass. A block's part of grad_q is summed up by itself, and then added to that of
// those before it: by the same item or, with the same bits, afterwards, if every item has one block. If there are
// more than a few blocks, items are spans of them, four at most.
int64_t key_span(const AttentionParams& p) {
  constexpr int64_t block = kAttentionBlock, few = 4 * block, more = 16;  // keys, as long as to add up a part of grad_q
  if (p.keys > few) return std::max(few, (p.keys + few - 1) / few * block);
  return time_of(p, p.keys, block, more) < time_of(p, p.keys, few, 0) ? block : few;
}

// out and lse. All tensors are as_heads, or lie so in bfloat16.
Tensor run_attention(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                     int terms) {
  Tensor lse = empty_of({q.size(0), q.size(1), q.size(2)}, ScalarType::Float, q);
  AttentionParams params = attention_params(q, k, v, scale);
  params.out = heads_view("out", out);
  params.lse = memory<float>("lse", lse);
  params.terms = terms;
  params.query_block = query_block(params, terms ? kTermsQueries : kAttentionBlock);
  const auto& kernels = cpu::level().kernels;
  if (!on_cuda(q))
    run_cpu(params, terms ? kernels.attention_terms : kernels.attention,
            params.samples * params.heads * params.query_blocks(),
            grain(2 * params.query_block * params.keys * params.channels));
  else if (q.numel() > 0)
    run_cuda(q, params, DIFFKERN_CUDA_LAUNCHER(attention));
  return lse;
}

// Three terms are as exact as floats are, and with AMX they are faster if many queries meet the keys that are packed.
int terms_of_floats(const Tensor& q) {
  const bool amx = !on_cuda(q) && std::string_view(cpu::level().name) == "avx512_amx";
  return amx && take_terms(q.size(3)) && q.size(2) >= 2 * kAttentionBlock ? kMaxTerms : 0;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  check_attention(q, k, v);
  Tensor out = empty_heads(q);
  Tensor lse = run_attention(out, as_heads("q", q), as_heads("k", k), as_heads("v", v), scale, terms_of_floats(q));
  return {as_dtype(out, q.scalar_type()), lse};
}

void attention_out(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                   std::optional<int64_t> terms) {
  check_attention(q, k, v);
  check_like("out", out, q, sizes_of(q));
  check(!terms || !on_cuda(q), "terms: expected None on a CUDA device, got ", terms.value_or(0));
  check(!terms || (*terms >= 1 && *terms <= kMaxTerms), "terms: expected 1 to ", kMaxTerms, ", got ",
        terms.value_or(0));
  const bool bf16 = terms == 1 && q.scalar_type() == ScalarType::BFloat16;
  check(bf16 || q.scalar_type() == heads_dtype(q), "q: expected float32", terms == 1 ? " or bfloat16" : "", ", got ",
        show(q.scalar_type()));
  check(!terms || take_terms(q.size(3)), "q: expected a multiple of ", kDepthBlock, " channels, and ", kMaxTermsHead,
        " at most, with terms, got ", q.size(3));
  for (const auto& [name, tensor] : {std::pair("out", out), {"q", q}, {"k", k}, {"v", v}})  // used where they lie
    check(tensor.stride(3) == 1, name, ": expected the channels of a token together, got a stride of ",
          tensor.stride(3));
  check_writable("out", out);
  check_apart("out", out, "q", q);
  check_apart("out", out, "k", k);
  check_apart("out", out, "v", v);
  run_attention(out, q, k, v, scale, int(terms.value_or(0)));
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      std::optional<double> scale) {
  check_attention(q, k, v);
  check_like("grad_out", grad_out, q, sizes_of(q));
  check_like("out", out, q, sizes_of(q));
  check_shape("lse", lse, {q.size(0), q.size(1), q.size(2)});
  check_dtype("lse", lse, ScalarType::Float);
  check_contiguous("lse", lse);
  const Tensor q_heads = as_heads("q", q), k_heads = as_heads("k", k), v_heads = as_heads("v", v);
  const Tensor out_heads = as_heads("out", out), grad_out_heads = as_heads("grad_out", grad_out);
  Tensor grad_q = empty_heads(q), grad_k = empty_heads(k), grad_v = empty_heads(k);
  AttentionParams params = attention_params(q_heads, k_heads, v_heads, scale);
  params.out = heads_view("out", out_heads);
  params.lse = memory<float>("lse", lse);
  params.grad_out = heads_view("grad_out", grad_out_heads);
  params.grad_q = heads_view("grad_q", grad_q);
  params.grad_k = heads_view("grad_k", grad_k);
  params.grad_v = heads_view("grad_v", grad_v);
  if (on_cuda(q)) {
    Tensor delta = empty_of(sizes_of(lse), ScalarType::Float, q);
    params.delta = memory<float>("delta", delta);
    if (q.numel() > 0) run_cuda(q, params, DIFFKERN_CUDA_LAUNCHER(attention_backward));
    return {grad_q, grad_k, grad_v};
  }
  params.key_span = key_span(params);
  const int64_t spans = params.key_spans();
  Tensor parts = empty_of({(spans - 1) * q.numel()}, ScalarType::Float, q);
  params.grad_q_parts = memory<float>("parts", parts);
  const auto& kernels = cpu::level().kernels;
  run_cpu(params, kernels.attention_backward, params.samples * params.heads * spans,
          grain(5 * params.queries * params.channels * std::min(params.keys, params.key_span)));
  if (spans > 1) run_cpu(params, kernels.attention_sum_grad_q, chunks(q.numel()), kChunkGrain);
  const ScalarType dtype = q.scalar_type();
  return {as_dtype(grad_q, dtype), as_dtype(grad_k, dtype), as_dtype(grad_v, dtype)};
}

DIFFKERN_OP(attention, "(Tensor q, Tensor k, Tensor v, float? scale) -> (Tensor, Tensor)")
DIFFKERN_OP(attention_out, "(Tensor(a!) out, Tensor q, Tensor k, Tensor v, float? scale, int? terms) -> ()")
DIFFKERN_OP(attention_backward,
            "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? scale) -> (Tensor, Tensor, "
            "Tensor)")

}  // namespace
}  // namespace diffkern
