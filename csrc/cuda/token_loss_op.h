// What the op `mdpgrpo_fast::_cuda_token_loss_rows` is called with, checked; and how a row is cut for a cluster.
#pragma once

#include <string>

#include "../inputs.h"
#include "token_loss.cuh"

namespace mdpgrpo {

const std::string TOKEN_LOSS_ROWS = std::string("(Tensor logits, Tensor(a!) gradient, ") + INPUTS +
                                    "Tensor denominator, Tensor lengths, Tensor ratio, Tensor slope, Tensor drift, "
                                    "Tensor statistics, int num_completions, "
                                    "Tensor(b!) per_row, Tensor(c!) marks, Tensor(d!) taken) -> ()";

struct RowCall {
  RowArguments p = {};
  DType dtype = DType::other;
  int32_t device = 0;
};

inline RowCall row_call(StableIValue* stack, int32_t device_type) {
  RowCall call;
  RowArguments& p = call.p;
  Arguments args(stack, device_type);
  const Tensor logits = args.tensor("logits"), gradient = args.tensor("gradient");
  const RowTensors given(args);
  const Tensor denominator = args.tensor("denominator"), lengths = args.tensor("lengths"), ratio = args.tensor("ratio"),
               slope = args.tensor("slope"), drift = args.tensor("drift"), statistics = args.tensor("statistics");
  const int64_t b = args.integer();
  const Tensor per_row = args.tensor("per_row"), marks = args.tensor("marks"), taken = args.tensor("taken");

  check(logits.dim() == 3 && (logits.size(2) == 1 || logits.stride(2) == 1), "logits must be (B, L, V), V contiguous");
  const int64_t n = logits.size(0) * logits.size(1), length = logits.size(1);
  check(n > 0 && logits.size(2) > 0, "logits must not be empty");
  p.logits = logits.data();
  p.vocab = logits.size(2);
  p.stride_b = logits.stride(0), p.stride_l = logits.stride(1);
  if (gradient.numel() > 0) {
    check(gradient.dim() == 3 && gradient.size(0) == logits.size(0) && gradient.size(1) == length &&
              gradient.size(2) == p.vocab && (p.vocab == 1 || gradient.stride(2) == 1),
          "gradient must have the shape of the logits, V contiguous");
    const DType expected = logits.dtype() == DType::float16 ? DType::float32 : logits.dtype();
    check(gradient.dtype() == expected, "gradient must be ", name_of(expected));
    p.gradient = gradient.data();
    p.gradient_stride_b = gradient.stride(0), p.gradient_stride_l = gradient.stride(1);
  }
  p.rows = given.rows<float>(n, length, b);
  p.settings = given.settings<float>();
  check(p.rows.advantage.each != nullptr && p.rows.kl_beta.each != nullptr, "advantage and kl_beta must be given");
  check(p.rows.logit_floor == nullptr, "rows with a logit_floor are not for this kernel");
  p.denominator = elements<float>(denominator, 1);
  p.lengths = elements<float>(lengths, b, p.settings.aggregation != 0);
  p.ratio = elements<float>(ratio, b, !p.settings.couples_ratio());
  p.slope = elements<float>(slope, b, !p.settings.couples_slope());
  p.drift = elements<float>(drift, b, !p.settings.couples_drift(p.rows));
  p.statistics = elements<float>(statistics, 5 * n, true);
  p.per_row = elements<float>(per_row, 5 * n);
  p.marks = elements<bool>(marks, 3 * n);
  p.taken = elements<int64_t>(taken, 1);
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
