// What the raw ops are called with: rows, groups and settings as mdpgrpo_fast/kernels/binaries.py hands them over,
// checked. An argument that is not given is an empty tensor.
#pragma once

#include <string>

#include "method.h"
#include "torch_abi.h"

namespace mdpgrpo {

#define X(name, ...) "Tensor " #name ", "
const char* const INPUTS = "Tensor tokens, Tensor mask, Tensor completion, " MDPGRPO_KNOBS(X)
    MDPGRPO_PER_ROW(X) "Tensor numbers, Tensor flags, ";
#undef X

struct SettingsTensors {
  Tensor numbers, flags;

  explicit SettingsTensors(Arguments& args) : numbers(args.host("numbers")), flags(args.host("flags")) {}
  const double* number() const { return elements<double>(numbers, NUM_NUMBERS); }

  template <class R>
  Settings<R> settings() const {
    const int64_t* const flag = elements<int64_t>(flags, NUM_FLAGS);
    Settings<R> s;
#define X(name, place) s.name = static_cast<R>(number()[place]);
    MDPGRPO_NUMBERS(X)
#undef X
#define X(type, name, place) s.name = static_cast<type>(flag[place]);
    MDPGRPO_FLAGS(X)
#undef X
    return s;
  }
};

struct RowTensors {
  Tensor tokens, mask, completion;
#define X(name, ...) Tensor name;
  MDPGRPO_KNOBS(X)
  MDPGRPO_PER_ROW(X)
#undef X
  SettingsTensors shared;

#define X(name, ...) name(args.tensor(#name)),
  explicit RowTensors(Arguments& args)
      : tokens(args.tensor("tokens")), mask(args.tensor("mask")), completion(args.tensor("completion")),
        MDPGRPO_KNOBS(X) MDPGRPO_PER_ROW(X) shared(args) {}
#undef X

  template <class R>
  Settings<R> settings() const {
    return shared.settings<R>();
  }

  // knobs_per_row: they have one value per row, also where there are as many rows as completions.
  template <class R>
  Rows<R> rows(int64_t n_rows, int64_t row_length, int64_t num_completions, bool knobs_per_row = false) const {
    Rows<R> r = {};
    r.n_rows = n_rows, r.row_length = row_length, r.num_completions = num_completions;
    r.tokens = elements<int64_t>(tokens, n_rows);
    r.mask = elements<uint8_t>(mask, n_rows, true);
    r.completion = elements<int64_t>(completion, n_rows, true);
    const auto knob = [&](const Tensor& t, int place) {
      Knob<R> k;
      k.per_row = knobs_per_row || t.numel() != num_completions;
      k.each = elements<float>(t, k.per_row ? n_rows : num_completions, true);
      if (place >= 0) k.number = static_cast<R>(shared.number()[place]);
      return k;
    };
#define X(name, place) r.name = knob(name, place);
    MDPGRPO_KNOBS(X)
#undef X
#define X(name) r.name = elements<float>(name, n_rows, true);
    MDPGRPO_PER_ROW(X)
#undef X
    return r;
  }
};

}  // namespace mdpgrpo
