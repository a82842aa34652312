// The ops `mdpgrpo_fast::_cpu_*`: raw arguments in, everything checked, rows in parallel. mdpgrpo_fast/kernels/cpu.py
// prepares the arguments.
#include <algorithm>
#include <cmath>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "objective.h"
#include "sample.h"
#include "sweep.h"

namespace mdpgrpo {
namespace {

// Gradients beyond this size are written past the caches: who reads them next finds little of them there anyway.
constexpr int64_t STREAMING_BYTES = int64_t{8} << 20;

// ---- arguments ------------------------------------------------------------------------------------------------------

// Where the gradient goes, if anywhere.
struct Gradient {
  bool wanted, streaming = false;
  Logits to;

  Gradient(const Tensor& t, const Logits& logits) : wanted(t.numel() > 0), to(wanted ? Logits(t) : logits) {
    check(to.batch == logits.batch && to.length == logits.length && to.vocab == logits.vocab, t.name(),
          " must have the shape of the logits");
    if (!wanted || to.data == logits.data) return;
    const int64_t bytes = t.numel() * to.item;
    streaming = bytes >= STREAMING_BYTES;
#ifdef MADV_HUGEPAGE
    // Fresh memory costs a page fault every 4 KiB otherwise, which takes longer than all the arithmetic.
    constexpr uintptr_t huge = uintptr_t{2} << 20;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(to.data) + 4095) & ~uintptr_t{4095};
    if (t.contiguous() && static_cast<uintptr_t>(bytes) >= 2 * huge)
      madvise(reinterpret_cast<void*>(start), (static_cast<size_t>(bytes) - 4096) & ~size_t{4095}, MADV_HUGEPAGE);
#endif
  }
  void zero(int64_t i) const { std::memset(to.row(i), 0, static_cast<size_t>(to.vocab * to.item)); }
};

// ---- ops ------------------------------------------------------------------------------------------------------------

const std::string TOKEN_LOSS =
    std::string("(Tensor logits, Tensor(a!) gradient, ") + INPUTS +
    "Tensor rewards, Tensor num_constraints, Tensor valid, Tensor slots, Tensor batch_std, Tensor denominator, "
    "int num_completions, int max_completion_length, Tensor(b!) loss, Tensor(c!) per_row, Tensor(d!) marks, "
    "Tensor(e!) completion_kl, Tensor(f!) totals) -> ()";

void token_loss(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack, aoti_torch_device_type_cpu());
  const Tensor logits_ = args.tensor("logits"), gradient_ = args.tensor("gradient");
  const RowTensors given(args);
  const Tensor rewards_ = args.tensor("rewards"), constraints_ = args.tensor("num_constraints"),
               valid_ = args.tensor("valid"), slots_ = args.tensor("slots"), batch_std_ = args.tensor("batch_std"),
               denominator_ = args.tensor("denominator");
  const int64_t b = args.integer(), max_length = args.integer();
  const Tensor loss_ = args.tensor("loss"), per_row_ = args.tensor("per_row"), marks_ = args.tensor("marks"),
               completion_kl_ = args.tensor("completion_kl"), totals_ = args.tensor("totals");

  const Logits logits(logits_);
  const Gradient gradient(gradient_, logits);
  const int64_t n = logits.rows();
  check(b > 0, "rows belong to completions: num_completions must be above 0, not ", std::to_string(b));
  const Record record{n, elements<float>(per_row_, 5 * n), elements<bool>(marks_, 3 * n)};
  float* const loss = elements<float>(loss_, 1);
  float* const completion_kl = elements<float>(completion_kl_, b);
  float* const totals = elements<float>(totals_, 8);
  Objective objective(given, n, logits.length, b);
  Rows<double>& rows = objective.rows;
  const Settings<double>& settings = objective.settings;

  std::vector<float> advantages, betas;
  if (rewards_.numel() > 0) {
    const Settings<float> s = given.settings<float>();
    const int64_t size = s.group_size;
    check(size > 0 && rewards_.numel() % size == 0, "rewards must be whole groups");
    const int64_t prompts = rewards_.numel() / size;
    const float* const rewards = elements<float>(rewards_, prompts * size);
    const float* const constraints = elements<float>(constraints_, prompts);
    const uint8_t* const valid = elements<uint8_t>(valid_, prompts * size, true);
    const int64_t* const slots = elements<int64_t>(slots_, b, true);
    const float* const batch_std = s.scale == BY_BATCH ? elements<float>(batch_std_, 1) : nullptr;
    std::vector<Completion> each(static_cast<size_t>(prompts * size));
    for (int64_t p = 0; p < prompts; ++p) {
      float mean, std_;
      group_advantages(rewards + p * size, valid == nullptr ? nullptr : valid + p * size, constraints[p], batch_std, s,
                       mean, std_, each.data() + p * size);
    }
    for (int64_t c = 0; c < b; ++c) {
      const int64_t place = slots == nullptr ? c : slots[c];
      check(place >= 0 && place < prompts * size, "slots must point into the rewards");
      advantages.push_back(each[static_cast<size_t>(place)].advantage);
      betas.push_back(each[static_cast<size_t>(place)].beta);
    }
    rows.advantage.each = advantages.data(), rows.kl_beta.each = betas.data();
    rows.advantage.per_row = rows.kl_beta.per_row = false;
  }

  const int64_t grain = GRAIN / std::max<int64_t>(logits.vocab, 1);
  RowOptions options{logits.vocab, settings.softcap, settings.two_temperatures, false};
  const auto seen = [&](const Sweep& sweep, const Row& r) {
    return Seen{r.logprob, static_cast<float>(r.statistics.entropy), sweep.kl_logprob(r, settings.kl_temperature)};
  };
  if (settings.first_pass(rows)) {
    // What the tokens of a completion share needs all of them first; until it is known there is room in the output.
    float* const kept = record.per_row;
    parallel(n, grain, [&](int64_t begin, int64_t end) {
      const Sweep sweep(logits, rows.tokens, options, settings.kl_temperature, rows.logit_floor);
      for (int64_t row = begin; row < end; ++row) {
        if (!rows.kept(row)) continue;
        const double tau = rows.temperature_of(rows.completion_of(row), row);
        const Seen s = seen(sweep, sweep.read(row, tau, rows.known(row)));
        kept[row] = s.logprob, kept[n + row] = s.entropy, kept[2 * n + row] = s.kl_logprob;
      }
    });
    objective.couple([&](int64_t row) { return Seen{kept[row], kept[n + row], kept[2 * n + row]}; });
  } else {
    objective.couple([](int64_t) { return Seen{}; });
  }
  double denominator = 0;
  if (denominator_.numel() > 0) {
    denominator = *elements<float>(denominator_, 1);
  } else {
    for (const double length : objective.lengths)
      denominator += settings.aggregation == 1 || settings.aggregation == 3 ? length : length > 0;
    if (settings.aggregation == 2) denominator *= static_cast<double>(max_length);
  }

  options.keep = gradient.wanted;
  parallel(n, grain, [&](int64_t begin, int64_t end) {
    const Sweep sweep(logits, rows.tokens, options, settings.kl_temperature, rows.logit_floor);
    for (int64_t row = begin; row < end; ++row) {
      if (!rows.kept(row)) {
        record.masked(row);
        if (gradient.wanted) gradient.zero(row);
        continue;
      }
      const int64_t c = rows.completion_of(row);
      const double tau = rows.temperature_of(c, row);
      const Row r = sweep.read(row, tau, rows.known(row));
      const bool two_temperatures = settings.two_temperatures;
      const Token<double> t = objective.at(row, c, tau, seen(sweep, r));
      const double share = objective.share(denominator, objective.lengths[static_cast<size_t>(c)]);
      record.token(row, r.logprob, r.statistics.entropy, t, share);
      if (!gradient.wanted) continue;
      const double a = share * (two_temperatures ? t.c : t.c + t.c_kl) / tau;
      const double a_kl = two_temperatures ? share * t.c_kl / settings.kl_temperature : 0;
      const double bonus = share * t.bonus / tau;
      if (a == 0 && a_kl == 0 && bonus == 0)
        gradient.zero(row);
      else
        sweep.write(gradient.to.row(row), gradient.to.element, r, a, a_kl, bonus, gradient.streaming,
                    logits.after(row));
    }
  });
  sum_up(given.rows<float>(n, logits.length, b), record, loss, completion_kl, totals);
}

const std::string LOGPROBS = std::string("(Tensor logits, Tensor(a!) gradient, ") + INPUTS +
                             "int num_completions, Tensor(b!) logprobs, Tensor(c!) statistics) -> ()";

// ℓ and the statistics of rows, 0 where masked; with a gradient also ∂ℓ/∂x.
void logprobs(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack, aoti_torch_device_type_cpu());
  const Tensor logits_ = args.tensor("logits"), gradient_ = args.tensor("gradient");
  const RowTensors given(args);
  const int64_t b = args.integer();
  const Tensor logprobs_ = args.tensor("logprobs"), statistics_ = args.tensor("statistics");

  const Logits logits(logits_);
  const Gradient gradient(gradient_, logits);
  const int64_t n = logits.rows();
  const Rows<double> rows = given.rows<double>(n, logits.length, b);
  const Settings<double> settings = given.settings<double>();
  check(!(settings.two_temperatures && gradient.wanted), "the gradient of two temperatures needs their weights");
  float* const out = elements<float>(logprobs_, n);
  float* const statistics = elements<float>(statistics_, 5 * n);
  const RowOptions options{logits.vocab, settings.softcap, settings.two_temperatures, gradient.wanted};
  parallel(n, GRAIN / std::max<int64_t>(logits.vocab, 1), [&](int64_t begin, int64_t end) {
    const Sweep sweep(logits, rows.tokens, options, settings.kl_temperature, rows.logit_floor);
    for (int64_t row = begin; row < end; ++row) {
      double values[6] = {};
      if (rows.kept(row)) {
        // Without a map of completions every knob may be one per row.
        const bool known = b == 0 || rows.known(row);
        const double tau = rows.temperature_of(b == 0 ? 0 : rows.completion_of(row), row);
        const Row r = sweep.read(row, tau, known);
        const RowStatistics& s = r.statistics;
        const double found[6] = {s.peak, s.log_total, s.entropy, s.log_total_kl, r.own.z, r.logprob};
        std::copy(found, found + 6, values);
        if (gradient.wanted)
          sweep.write(gradient.to.row(row), gradient.to.element, r, 1 / tau, 0, 0, gradient.streaming,
                      logits.after(row));
      } else if (gradient.wanted) {
        gradient.zero(row);
      }
      for (int64_t i = 0; i < 5; ++i) statistics[i * n + row] = static_cast<float>(values[i]);
      out[row] = static_cast<float>(values[5]);
    }
  });
}

const std::string LOGPROBS_BACKWARD =
    std::string("(Tensor logits, Tensor(a!) gradient, Tensor grad_logprobs, Tensor grad_kl, Tensor grad_entropy, ") +
    INPUTS + "int num_completions, Tensor statistics) -> ()";

// Σ of the incoming gradients times ∂ℓ/∂x, of one temperature or two, and times -∂H/∂x; the statistics are given.
void logprobs_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack, aoti_torch_device_type_cpu());
  const Tensor logits_ = args.tensor("logits"), gradient_ = args.tensor("gradient"),
               grad_ = args.tensor("grad_logprobs"), grad_kl_ = args.tensor("grad_kl"),
               grad_entropy_ = args.tensor("grad_entropy");
  const RowTensors given(args);
  const int64_t b = args.integer();
  const Tensor statistics_ = args.tensor("statistics");

  const Logits logits(logits_);
  const Gradient gradient(gradient_, logits);
  check(gradient.wanted, "gradient must be given");
  const int64_t n = logits.rows();
  const float* const grad = elements<float>(grad_, n);
  const float* const grad_kl = elements<float>(grad_kl_, n, true);
  const float* const grad_entropy = elements<float>(grad_entropy_, n, true);
  const Rows<double> rows = given.rows<double>(n, logits.length, b);
  const Settings<double> settings = given.settings<double>();
  const float* const statistics = elements<float>(statistics_, 5 * n);
  const RowOptions options{logits.vocab, settings.softcap, grad_kl != nullptr, true};
  parallel(n, GRAIN / std::max<int64_t>(logits.vocab, 1), [&](int64_t begin, int64_t end) {
    const Sweep sweep(logits, rows.tokens, options, settings.kl_temperature, rows.logit_floor);
    for (int64_t row = begin; row < end; ++row) {
      const double tau = rows.temperature_of(b == 0 ? 0 : rows.completion_of(row), row);
      const double a = grad[row] / tau, a_kl = grad_kl == nullptr ? 0 : grad_kl[row] / settings.kl_temperature;
      const double bonus = grad_entropy == nullptr ? 0 : grad_entropy[row] / tau;
      const bool none = grad[row] == 0 && a_kl == 0 && (grad_entropy == nullptr || grad_entropy[row] == 0);
      if (!rows.kept(row) || none) {
        gradient.zero(row);
        continue;
      }
      Row r = sweep.read(row, tau, true);
      r.statistics = {statistics[row], statistics[n + row], statistics[2 * n + row], statistics[3 * n + row]};
      sweep.write(gradient.to.row(row), gradient.to.element, r, a, a_kl, bonus, gradient.streaming, logits.after(row));
    }
  });
}

const std::string OBJECTIVE = std::string("(Tensor statistics, Tensor logprobs, ") + INPUTS +
                              "Tensor lengths, Tensor denominator, int num_completions, Tensor(a!) per_row, "
                              "Tensor(b!) marks, Tensor(c!) weights) -> ()";

// The objective of rows whose statistics are known, and ∂loss/∂ℓ.
void objective(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack, aoti_torch_device_type_cpu());
  const Tensor statistics_ = args.tensor("statistics"), logprobs_ = args.tensor("logprobs");
  const RowTensors given(args);
  const Tensor lengths_ = args.tensor("lengths"), denominator_ = args.tensor("denominator");
  const int64_t b = args.integer();
  const Tensor per_row_ = args.tensor("per_row"), marks_ = args.tensor("marks"), weights_ = args.tensor("weights");

  const int64_t n = given.completion.numel();
  check(b > 0, "rows belong to completions: num_completions must be above 0, not ", std::to_string(b));
  Objective o(given, n, 1, b, true);
  const Rows<double>& rows = o.rows;
  const bool two_temperatures = o.settings.two_temperatures, bonus = rows.has_bonus();
  const float* const s = elements<float>(statistics_, 5 * n);
  const float* const logprobs = elements<float>(logprobs_, n, true);
  const float* const lengths = elements<float>(lengths_, b);
  const double denominator = *elements<float>(denominator_, 1);
  const Record record{n, elements<float>(per_row_, 5 * n), elements<bool>(marks_, 3 * n)};
  float* const weights = elements<float>(weights_, (1 + two_temperatures + bonus) * n);
  check(!o.settings.first_pass(rows) || logprobs != nullptr,
        "logprobs are needed where the tokens of a completion share more than its length");
  const auto seen = [&](int64_t row) {
    const int64_t c = rows.completion_of(row);
    const double z = static_cast<double>(s[4 * n + row]) - s[row];
    Seen found{static_cast<float>(z / rows.temperature_of(c, row) - s[n + row]), s[2 * n + row], 0};
    found.kl_logprob =
        two_temperatures ? static_cast<float>(z / o.settings.kl_temperature - s[3 * n + row]) : found.logprob;
    return found;
  };
  o.couple([&](int64_t row) {
    Seen found = seen(row);
    if (logprobs != nullptr) found.logprob = logprobs[row];
    return found;
  });
  for (int64_t row = 0; row < n; ++row) {
    if (!rows.kept(row)) {
      record.masked(row);
      for (int64_t i = 0; i < 1 + two_temperatures + bonus; ++i) weights[i * n + row] = 0;
      continue;
    }
    const int64_t c = rows.completion_of(row);
    const Seen found = seen(row);
    const Token<double> t = o.at(row, c, rows.temperature_of(c, row), found);
    const double share = o.share(denominator, lengths[c]);
    record.token(row, found.logprob, found.entropy, t, share);
    weights[row] = static_cast<float>(share * (two_temperatures ? t.c : t.c + t.c_kl));
    if (two_temperatures) weights[n + row] = static_cast<float>(share * t.c_kl);
    if (bonus) weights[(1 + two_temperatures) * n + row] = static_cast<float>(share * t.bonus);
  }
}

const std::string TOTALS = std::string("(Tensor per_row, Tensor marks, ") + INPUTS +
                           "int num_completions, Tensor(a!) loss, Tensor(b!) completion_kl, Tensor(c!) totals) -> ()";

void totals(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack, aoti_torch_device_type_cpu());
  const Tensor per_row_ = args.tensor("per_row"), marks_ = args.tensor("marks");
  const RowTensors given(args);
  const int64_t b = args.integer();
  const Tensor loss_ = args.tensor("loss"), completion_kl_ = args.tensor("completion_kl"),
               totals_ = args.tensor("totals");
  const int64_t n = given.completion.numel();
  const Record record{n, elements<float>(per_row_, 5 * n), elements<bool>(marks_, 3 * n)};
  sum_up(given.rows<float>(n, 1, b, true), record, elements<float>(loss_, 1), elements<float>(completion_kl_, b),
         elements<float>(totals_, 8));
}

const char* const ADVANTAGES =
    "(Tensor numbers, Tensor flags, Tensor rewards, Tensor num_constraints, Tensor valid, Tensor slots, "
    "Tensor batch_std, Tensor(a!) per_group, Tensor(b!) per_completion) -> ()";

void advantages(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack, aoti_torch_device_type_cpu());
  const SettingsTensors given(args);
  const Tensor rewards_ = args.tensor("rewards"), constraints_ = args.tensor("num_constraints"),
               valid_ = args.tensor("valid"), slots_ = args.tensor("slots"), batch_std_ = args.tensor("batch_std"),
               groups_ = args.tensor("per_group"), completions_ = args.tensor("per_completion");
  const Settings<float> s = given.settings<float>();
  const int64_t g = s.group_size, p = constraints_.numel(), n = p * g;
  const float* const rewards = elements<float>(rewards_, n);
  const float* const constraints = elements<float>(constraints_, p);
  const uint8_t* const valid = elements<uint8_t>(valid_, n, true);
  const float* const batch_std = s.scale == BY_BATCH ? elements<float>(batch_std_, 1) : nullptr;
  float* const groups = elements<float>(groups_, 2 * p);
  float* const out = elements<float>(completions_, 4 * n);
  parallel(p, GRAIN / std::max<int64_t>(8 * g, 1), [&](int64_t begin, int64_t end) {
    std::vector<Completion> each(static_cast<size_t>(g));
    for (int64_t i = begin; i < end; ++i) {
      float mean, std_;
      group_advantages(rewards + i * g, valid == nullptr ? nullptr : valid + i * g, constraints[i], batch_std, s, mean,
                       std_, each.data());
      groups[i] = mean, groups[p + i] = std_;
      for (int64_t j = 0; j < g; ++j) {
        const Completion& c = each[static_cast<size_t>(j)];
        const float values[4] = {c.z, c.delta, c.advantage, c.beta};
        for (int64_t k = 0; k < 4; ++k) out[k * n + i * g + j] = values[k];
      }
    }
  });
}

void scale(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack, aoti_torch_device_type_cpu());
  const Tensor gradient_ = args.tensor("gradient"), scale_ = args.tensor("scale");
  const Logits gradient(gradient_);
  const float factor = *elements<float>(scale_, 1);
  if (factor == 1.0f) return;
  const RowKernels& kernels = row_kernels();
  parallel(gradient.rows(), GRAIN / std::max<int64_t>(gradient.vocab, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels.scale[gradient.element](gradient.row(row), gradient.vocab, factor);
  });
}

// Empty, or why the ops are not there. An exception while a library is being loaded would end the process.
std::string load_error;

const bool registered = [] {
  try {
    row_kernels();
    static Library library("CPU", "csrc/cpu/ops.cpp");
    library.add("_cpu_token_loss", TOKEN_LOSS, token_loss);
    library.add("_cpu_logprobs", LOGPROBS, logprobs);
    library.add("_cpu_logprobs_backward", LOGPROBS_BACKWARD, logprobs_backward);
    library.add("_cpu_objective", OBJECTIVE, objective);
    library.add("_cpu_totals", TOTALS, totals);
    library.add("_cpu_advantages", ADVANTAGES, advantages);
    library.add("_cpu_sample", SAMPLE, sample);
    library.add("_cpu_scale", "(Tensor(a!) gradient, Tensor scale) -> ()", scale);
  } catch (const std::exception& e) {
    load_error = e.what();
  }
  return load_error.empty();
}();

}  // namespace
}  // namespace mdpgrpo

extern "C" {
__attribute__((visibility("default"))) const char* mdpgrpo_error() { return mdpgrpo::load_error.c_str(); }
__attribute__((visibility("default"))) const char* mdpgrpo_variant() {
  return mdpgrpo::registered ? mdpgrpo::row_kernels().name : "";
}
}
