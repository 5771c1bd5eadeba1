// The kernels as operators of torch: `torch.ops.stepladder_cpu`. What they compute is said in native.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace stepladder {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Numbers numbers(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "a kernel for CPU ranks reads contiguous tensors only");
  switch (tensor.scalar_type()) {
    case at::kFloat: return {tensor.data_ptr(), Form::fp32};
    case at::kBFloat16: return {tensor.data_ptr(), Form::bf16};
    case at::kHalf: return {tensor.data_ptr(), Form::fp16};
    default: TORCH_CHECK(false, "a kernel for CPU ranks computes in float32, bfloat16 or float16, not in ", tensor.scalar_type());
  }
}

const float* floats(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == at::kFloat);
  return tensor.const_data_ptr<float>();
}

const int64_t* integers(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == at::kLong);
  return tensor.const_data_ptr<int64_t>();
}

struct MaybeNorm {  // a norm where there is a weight
  MaybeNorm(const OptionalTensor& weight, double eps, bool layer)
      : norm{weight ? floats(*weight) : nullptr, (float)eps, layer} {}
  const Norm* get() const { return norm.weight ? &norm : nullptr; }
  Norm norm;
};

Tensor norm(const Tensor& x, const Tensor& weight, double eps, bool layer) {
  const int64_t K = x.size(-1);
  TORCH_CHECK(weight.numel() == K);
  Tensor rows = x.contiguous(), y = at::empty(x.sizes(), x.options());
  norm_rows(numbers(rows), numbers(y), x.numel() / std::max<int64_t>(1, K), K, {floats(weight), (float)eps, layer});
  return y;
}

Tensor project(const Tensor& x, const Tensor& panels, int64_t outputs, const OptionalTensor& bias, bool gated,
               const OptionalTensor& norm_weight, double eps, bool layer, at::ScalarType dtype) {
  TORCH_CHECK(x.dim() == 2 && panels.dim() == 3 && panels.size(2) == PANEL && x.size(1) == panels.size(1));
  Tensor rows = x.contiguous(), y = at::empty({x.size(0), gated ? outputs / 2 : outputs}, x.options().dtype(dtype));
  MaybeNorm norm(norm_weight, eps, layer);
  Matrix matrix{numbers(panels), bias ? floats(*bias) : nullptr, outputs, x.size(1), gated};
  product(numbers(rows), x.size(0), norm.get(), matrix, numbers(y));
  return y;
}

Pages pages_of(const Tensor& keys, const Tensor& values) {
  TORCH_CHECK(keys.dim() == 5 && values.dim() == 4 && keys.scalar_type() == values.scalar_type());
  return {numbers(keys), numbers(values), values.size(2), keys.size(4)};
}

Tensor rotate_and_store(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& slots, int64_t H,
                        const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps, bool layer,
                        bool interleaved, Tensor keys, Tensor values) {
  Heads heads{H, values.size(1), values.size(3)};
  TORCH_CHECK(qkv.dim() == 2 && qkv.size(1) == heads.width() && cos.numel() == qkv.size(0) * heads.D);
  Tensor q = at::empty({qkv.size(0), H, heads.D}, qkv.options());
  rotate(floats(qkv), floats(cos), floats(sin), integers(slots), qkv.size(0), heads, MaybeNorm(q_norm, eps, layer).get(),
         MaybeNorm(k_norm, eps, layer).get(), interleaved, pages_of(keys, values), q.data_ptr<float>());
  return q;
}

Tensor attend_pages(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& first,
                    const Tensor& positions, const Tensor& tables, int64_t window) {
  Heads heads{q.size(1), values.size(1), q.size(2)};
  TORCH_CHECK(q.dim() == 3 && first.size(0) == tables.size(0) + 1 && positions.size(0) == q.size(0));
  Tensor y = at::empty({q.size(0), heads.H * heads.D}, q.options());
  Batch batch{integers(first), integers(positions), integers(tables), tables.size(0), tables.size(1)};
  attend(floats(q), pages_of(keys, values), batch, heads, window, y.data_ptr<float>());
  return y;
}

// One libm call per number: a vector function would round the last numbers of a batch unlike the others.
std::tuple<Tensor, Tensor> rope_table(const Tensor& positions, const Tensor& frequencies, bool interleaved, double factor) {
  const int64_t T = positions.size(0), half = frequencies.size(0);
  Tensor cos = at::empty({T, 2 * half}, frequencies.options()), sin = at::empty({T, 2 * half}, frequencies.options());
  const float* frequency = floats(frequencies);
  const int64_t* position = integers(positions);
  float *c = cos.data_ptr<float>(), *s = sin.data_ptr<float>();
  share(T, T * half * 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t i = 0; i < half; i++) {
        const float angle = (float)position[t] * frequency[i];
        const int64_t one = t * 2 * half + (interleaved ? 2 * i : i), other = one + (interleaved ? 1 : half);
        c[one] = c[other] = std::cos(angle) * (float)factor;
        s[one] = s[other] = std::sin(angle) * (float)factor;
      }
  });
  return {cos, sin};
}

bool are_clear(const Tensor& columns) {
  const int64_t* first = integers(columns);
  return std::none_of(first, first + columns.numel(), [](int64_t column) { return column < 0; });
}

std::tuple<Tensor, bool> draw_columns(const Tensor& scores, const OptionalTensor& tokens, const Tensor& seeds, const Tensor& positions) {
  const int64_t R = scores.size(0), V = scores.size(1);
  TORCH_CHECK(scores.dim() == 2 && seeds.numel() == R && positions.numel() == R && (!tokens || tokens->numel() == V));
  Tensor columns = at::empty({R}, seeds.options());
  draw(floats(scores), tokens ? integers(*tokens) : nullptr, R, V, integers(seeds), integers(positions), columns.data_ptr<int64_t>());
  return {columns, are_clear(columns)};
}

Tensor advance_cell(const Tensor& state, const Tensor& embedded, const Tensor& gated, int64_t outputs, const Tensor& out) {
  const int64_t N = state.size(0), H = state.size(1), width = outputs / 2 + 2 * H;
  TORCH_CHECK(state.dim() == 2 && embedded.sizes() == state.sizes() && gated.size(1) == 2 * H && out.size(1) == width);
  Tensor next = at::empty({N, H}, state.options());
  advance(floats(state), floats(embedded), N, H, {{numbers(gated), nullptr, outputs, 2 * H, true}, {numbers(out), nullptr, H, width, false}},
          next.data_ptr<float>());
  return next;
}

std::tuple<Tensor, Tensor, bool> sample_columns(const Tensor& logits, const OptionalTensor& tokens, at::ArrayRef<double> temperatures,
                                                at::IntArrayRef seeds, at::IntArrayRef positions, bool shares) {
  const int64_t R = logits.size(0), V = logits.size(1);
  TORCH_CHECK(logits.dim() == 2 && V > 0 && (!tokens || tokens->numel() == V));
  TORCH_CHECK((int64_t)temperatures.size() == R && (int64_t)seeds.size() == R && (int64_t)positions.size() == R);
  Tensor columns = at::empty({R}, logits.options().dtype(at::kLong)), found = at::empty({shares ? R : 0}, logits.options());
  sample(floats(logits), tokens ? integers(*tokens) : nullptr, R, V, temperatures.data(), seeds.data(), positions.data(),
         columns.data_ptr<int64_t>(), shares ? found.data_ptr<float>() : nullptr);
  return {columns, found, are_clear(columns)};
}

Tensor mix_experts(const Tensor& x, const Tensor& weights, const Tensor& chosen, const Tensor& in, const Tensor& out, int64_t inner,
                   int64_t first) {
  const int64_t T = x.size(0), H = x.size(1), count = in.size(0);
  TORCH_CHECK(in.dim() == 4 && out.dim() == 4 && in.size(2) == H && out.size(2) == inner && out.size(0) == count);
  TORCH_CHECK(x.dim() == 2 && weights.size(0) == T && chosen.sizes() == weights.sizes());
  Tensor rows = x.to(at::kFloat).contiguous(), w = weights.contiguous(), e = chosen.contiguous();
  Tensor y = at::empty({T, H}, rows.options());
  const Experts experts{numbers(in), numbers(out), in[0].numel(), out[0].numel(), count, first, H, inner};
  mix(floats(rows), T, floats(w), integers(e), chosen.size(1), experts, y.data_ptr<float>());
  return y;
}

thread_local int taken = 0;

// Of this thread alone; at::set_num_threads would tell those that are born meanwhile, too.
void set_threads(int number) {
#ifdef _OPENMP
  omp_set_num_threads(number);
#else
  at::set_num_threads(number);
#endif
}

// From here on torch's own operators run on one thread, and kernels on as many as torch had. False: that was so already.
bool take_threads() {
  if (taken) return false;
  taken = at::get_num_threads();
  set_threads(1);
  return true;
}

void give_back_threads() {
  set_threads(taken);
  taken = 0;
}

TORCH_LIBRARY(stepladder_cpu, m) {
  m.def("take_threads() -> bool", take_threads);
  m.def("give_back_threads() -> ()", give_back_threads);
  m.def("norm(Tensor x, Tensor weight, float eps, bool layer) -> Tensor");
  m.def("project(Tensor x, Tensor panels, int outputs, Tensor? bias, bool gated, Tensor? norm, float eps, bool layer, ScalarType dtype) -> Tensor");
  m.def("rotate_and_store(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, int heads, Tensor? q_norm, Tensor? k_norm, float eps, bool layer, bool interleaved, Tensor(a!) keys, Tensor(b!) values) -> Tensor");
  m.def("attend(Tensor q, Tensor keys, Tensor values, Tensor first, Tensor positions, Tensor tables, int window) -> Tensor");
  m.def("draw(Tensor scores, Tensor? tokens, Tensor seeds, Tensor positions) -> (Tensor, bool)");
  m.def("mix_experts(Tensor x, Tensor weights, Tensor chosen, Tensor gate_up, Tensor down, int inner, int first) -> Tensor");
  m.def("advance(Tensor state, Tensor embedded, Tensor gated, int outputs, Tensor out) -> Tensor");
  m.def("sample(Tensor logits, Tensor? tokens, float[] temperatures, int[] seeds, int[] positions, bool shares) -> (Tensor, Tensor, bool)");
  m.def("rope_table(Tensor positions, Tensor frequencies, bool interleaved, float factor) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(stepladder_cpu, CPU, m) {
  m.impl("norm", norm);
  m.impl("project", project);
  m.impl("rotate_and_store", rotate_and_store);
  m.impl("attend", attend_pages);
  m.impl("draw", draw_columns);
  m.impl("mix_experts", mix_experts);
  m.impl("advance", advance_cell);
  m.impl("sample", sample_columns);
  m.impl("rope_table", rope_table);
}

}  // namespace

int threads() { return taken ? taken : at::get_num_threads(); }

}  // namespace stepladder
