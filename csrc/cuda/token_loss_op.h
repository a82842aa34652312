// What the op `mdpgrpo_fast::_cuda_token_loss_rows` is called with, checked; and how a row is cut for a cluster.
#pragma once

#include <string>

#include "../torch_abi.h"
#include "token_loss.cuh"

namespace mdpgrpo {

const char* const TOKEN_LOSS_ROWS =
    "(Tensor logits, Tensor(a!) gradient, Tensor tokens, Tensor mask, Tensor completion, Tensor old_logprobs, "
    "Tensor ref_logprobs, Tensor importance_weight, Tensor temperature, Tensor epsilon_low, Tensor epsilon_high, "
    "Tensor advantage, Tensor kl_beta, Tensor denominator, Tensor lengths, Tensor ratio, Tensor slope, "
    "Tensor statistics, int n_completions, float temperature_value, float epsilon_low_value, "
    "float epsilon_high_value, float delta, float softcap, float kl_temperature, int estimator, bool sequence, "
    "bool mean_of_means, bool rescale, bool two, Tensor(b!) rows, Tensor(c!) marks) -> ()";

struct RowCall {
  RowArguments p = {};
  DType dtype = DType::other;
  bool two = false;
  int32_t device = 0;
};

inline RowCall row_call(StableIValue* stack, int32_t device_type) {
  RowCall call;
  RowArguments& p = call.p;
  Arguments args(stack, device_type);
  const Tensor logits = args.tensor("logits"), gradient = args.tensor("gradient"), tokens = args.tensor("tokens"),
               mask = args.tensor("mask"), completion = args.tensor("completion"), old = args.tensor("old_logprobs"),
               ref = args.tensor("ref_logprobs"), weight = args.tensor("importance_weight"),
               temperature = args.tensor("temperature"), low = args.tensor("epsilon_low"),
               high = args.tensor("epsilon_high"), advantage = args.tensor("advantage"), beta = args.tensor("kl_beta"),
               denominator = args.tensor("denominator"), lengths = args.tensor("lengths"), ratio = args.tensor("ratio"),
               slope = args.tensor("slope"), statistics = args.tensor("statistics");
  const int64_t b = p.n_completions = args.integer();
  p.temperature_value = static_cast<float>(args.number());
  p.low_value = static_cast<float>(args.number());
  p.high_value = static_cast<float>(args.number());
  p.delta = static_cast<float>(args.number());
  p.softcap = static_cast<float>(args.number());
  p.kl_temperature = static_cast<float>(args.number());
  p.estimator = static_cast<int32_t>(args.integer());
  p.sequence = args.boolean();
  p.mean_of_means = args.boolean();
  p.rescale = args.boolean();
  call.two = args.boolean();
  const Tensor rows = args.tensor("rows"), marks = args.tensor("marks");

  check(logits.dim() == 3 && (logits.size(2) == 1 || logits.stride(2) == 1), "logits must be (B, L, V), V contiguous");
  const int64_t n = p.n_rows = logits.size(0) * logits.size(1);
  check(n > 0 && logits.size(2) > 0, "logits must not be empty");
  p.logits = logits.data();
  p.row_length = logits.size(1), p.vocab = logits.size(2);
  p.stride_b = logits.stride(0), p.stride_l = logits.stride(1);
  if (gradient.numel() > 0) {
    check(gradient.dim() == 3 && gradient.size(0) == logits.size(0) && gradient.size(1) == p.row_length &&
              gradient.size(2) == p.vocab && (p.vocab == 1 || gradient.stride(2) == 1),
          "gradient must have the shape of the logits, V contiguous");
    const DType expected = logits.dtype() == DType::float16 ? DType::float32 : logits.dtype();
    check(gradient.dtype() == expected, "gradient must be ", name_of(expected));
    p.gradient = gradient.data();
    p.gradient_stride_b = gradient.stride(0), p.gradient_stride_l = gradient.stride(1);
  }
  p.tokens = elements<int64_t>(tokens, n);
  p.mask = elements<uint8_t>(mask, n, true);
  p.completion = elements<int64_t>(completion, n, true);
  p.old_logprobs = elements<float>(old, n, true);
  p.ref_logprobs = elements<float>(ref, n, true);
  p.weight = elements<float>(weight, n, true);
  const auto knob_of = [&](const Tensor& t, const float*& each, bool& per_row) {
    per_row = t.numel() != b;
    each = elements<float>(t, per_row ? n : b, true);
  };
  knob_of(temperature, p.temperature, p.temperature_per_row);
  knob_of(low, p.epsilon_low, p.low_per_row);
  knob_of(high, p.epsilon_high, p.high_per_row);
  knob_of(advantage, p.advantage, p.advantage_per_row);
  knob_of(beta, p.beta, p.beta_per_row);
  check(p.advantage != nullptr && p.beta != nullptr, "advantage and kl_beta must be given");
  p.denominator = elements<float>(denominator, 1);
  p.lengths = elements<float>(lengths, b, !p.mean_of_means);
  p.ratio = elements<float>(ratio, b, !p.sequence);
  p.slope = elements<float>(slope, b, !p.sequence);
  p.statistics = elements<float>(statistics, 5 * n, true);
  p.rows = elements<float>(rows, 5 * n);
  p.marks = elements<bool>(marks, 3 * n);
  call.dtype = logits.dtype();
  check(call.dtype == DType::bfloat16 || call.dtype == DType::float16 || call.dtype == DType::float32,
        "logits must be float32, bfloat16 or float16, not ", name_of(call.dtype));
  check(aoti_torch_get_device_index(logits.handle(), &call.device) == 0, "logits have no device");
  return call;
}

// The blocks of a cluster and the bytes of a row that each holds.
struct RowShape {
  int cluster = 1;
  int64_t slice = 0;
};

inline RowShape row_shape(int64_t vocab, int64_t item, int64_t wanted_slice, int64_t largest_slice) {
  // A row that begins off 16 bytes takes one access more.
  const int64_t bytes = (vocab * item + 15 + 15) / 16 * 16;
  RowShape shape;
  while (shape.cluster < MAX_CLUSTER && bytes > shape.cluster * wanted_slice) shape.cluster *= 2;
  shape.slice = (bytes + shape.cluster * 16 - 1) / (shape.cluster * 16) * 16;
  check(shape.slice <= largest_slice, "a row of ", std::to_string(bytes), " bytes does not fit ",
        std::to_string(shape.cluster), " multiprocessors");
  return shape;
}

}  // namespace mdpgrpo
